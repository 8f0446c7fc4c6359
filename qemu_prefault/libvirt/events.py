# SPDX-License-Identifier: GPL-2.0-or-later
"""Events of domains that the daemon handles, and its logger."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from .hook_config import LifecycleEvent

log = logging.getLogger("qemu-prefault")


@dataclass(frozen=True, slots=True)
class DomainEvent:
    """A change in the life of a domain.

    :ivar what: The change, as it is logged after the domain's name.
    :ivar moment: The event that an action can be configured for, or None.
    """

    uuid: str
    name: str
    what: str
    moment: LifecycleEvent | None
