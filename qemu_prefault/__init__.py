# SPDX-License-Identifier: GPL-2.0-or-later
"""Fill the stage-2 page tables of a QEMU/KVM guest before the guest needs them.

::

    report = qemu_prefault.prefault("/run/vm.qmp")

This package exports every name in :mod:`qemu_prefault.api`. It also exports the exceptions,
``Code`` and ``ExitStatus`` from :mod:`qemu_prefault.errors`.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import (
        SCHEMA,
        VCPU_COUNTERS,
        AgentChoice,
        ByteSums,
        Counters,
        Dial,
        EventStream,
        Finding,
        Findings,
        MappedSection,
        Monitor,
        OnReady,
        Options,
        Populate,
        Progress,
        RamMap,
        Report,
        RunWarning,
        Seconds,
        SectionReport,
        Stage2Leaves,
        VcpuThread,
        Vm,
        check_plugin_options,
        connect,
        counters,
        describe_errno,
        follow,
        plugin_path,
        pre_fault_here,
        prefault,
        prefault_async,
        probe,
        probe_process,
        ram_map,
        replace_by,
    )
    from .deprecated.session import Policy as Policy
    from .deprecated.session import Session as Session
    from .errors import (
        AgentError,
        Code,
        CommandError,
        ExitStatus,
        FailedError,
        GoneError,
        InputError,
        LayoutError,
        LibvirtError,
        MonitorBusyError,
        MonitorError,
        PartialError,
        PtraceDeniedError,
        QemuPrefaultError,
        RefusedError,
        UnsupportedError,
    )

__version__ = "0.2.0.dev0"
__all__ = [
    "SCHEMA",
    "VCPU_COUNTERS",
    "AgentChoice",
    "AgentError",
    "ByteSums",
    "Code",
    "CommandError",
    "Counters",
    "Dial",
    "EventStream",
    "ExitStatus",
    "FailedError",
    "Finding",
    "Findings",
    "GoneError",
    "InputError",
    "LayoutError",
    "LibvirtError",
    "MappedSection",
    "Monitor",
    "MonitorBusyError",
    "MonitorError",
    "OnReady",
    "Options",
    "PartialError",
    "Populate",
    "Progress",
    "PtraceDeniedError",
    "QemuPrefaultError",
    "RamMap",
    "RefusedError",
    "Report",
    "RunWarning",
    "Seconds",
    "SectionReport",
    "Stage2Leaves",
    "UnsupportedError",
    "VcpuThread",
    "Vm",
    "__version__",
    "check_plugin_options",
    "connect",
    "counters",
    "describe_errno",
    "follow",
    "plugin_path",
    "pre_fault_here",
    "prefault",
    "prefault_async",
    "probe",
    "probe_process",
    "ram_map",
    "replace_by",
]

_ERRORS = frozenset(name for name in __all__ if name.endswith("Error")) | {"Code", "ExitStatus"}
#: Maps a name from version 0.1 to the module in qemu_prefault.deprecated that defines it.
_DEPRECATED = {"Policy": "session", "Session": "session"}

# Make the modules of version 0.1, such as qemu_prefault.survey, importable.
__path__.append(str(Path(__file__).parent / "deprecated"))


def __getattr__(name: str) -> object:
    # Load names on first use, so that ``qemu-prefault --help`` does not import the whole API.
    if name in _DEPRECATED:
        home = f"deprecated.{_DEPRECATED[name]}"
    elif name in _ERRORS:
        home = "errors"
    elif name in __all__:
        home = "api"
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{home}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
