# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon hears of libvirt, and where it logs."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from .hook_config import LifecycleEvent

log = logging.getLogger("qemu-prefault")


@dataclass(frozen=True, slots=True)
class DomainEvent:
    """A guest has been started, has come, or has gone: ``moment`` None."""

    uuid: str
    name: str
    what: str
    moment: LifecycleEvent | None
