# SPDX-License-Identifier: GPL-2.0-or-later
"""The domain events that the daemon handles, and the daemon's logger."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from .hook_config import LifecycleEvent

log = logging.getLogger("qemu-prefault")


@dataclass(frozen=True, slots=True)
class DomainEvent:
    """A lifecycle event of a domain.

    :ivar what: The text that the daemon logs after the domain name.
    :ivar moment: The event's name in the hook configuration, or None if no action can be configured
        for this event.
    """

    uuid: str
    name: str
    what: str
    moment: LifecycleEvent | None
