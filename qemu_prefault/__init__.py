# SPDX-License-Identifier: GPL-2.0-or-later
"""Fill the stage-2 page tables of a running QEMU's guest before the guest needs them.

The public API: :class:`Session` (``async with Session.open(qmp)``), :class:`Policy`,
:class:`Populate`, :class:`Report`, and the errors of :mod:`qemu_prefault.errors`; to look only,
:mod:`qemu_prefault.survey`; for small scripts, :mod:`qemu_prefault.scripting`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import QemuPrefaultError
    from .plan import Policy, Populate
    from .report import Report
    from .session import Session

__version__ = "0.1.0"
__all__ = ["Policy", "Populate", "QemuPrefaultError", "Report", "Session"]

_HOMES = {
    "Policy": "plan",
    "Populate": "plan",
    "QemuPrefaultError": "errors",
    "Report": "report",
    "Session": "session",
}


def __getattr__(name: str) -> Any:
    # `qemu-prefault --help` imports this package too, and wants none of it.
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
