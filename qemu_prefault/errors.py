# SPDX-License-Identifier: GPL-2.0-or-later
"""One tree of errors: every error says what failed, on what, and what to do now.

The leaves are grouped by what the operator can conclude, which is also the exit
status of the command line::

    QemuPrefaultError
    ├── FailedError              1  it should have worked and did not
    │   ├── MonitorError            the QMP conversation
    │   │   └── CommandError        QEMU understood a command and refused it
    │   ├── LayoutError             QEMU's description of guest memory makes no sense
    │   ├── GoneError               QEMU, or one of its threads, does not exist any more
    │   ├── AgentError              the helper inside QEMU
    │   └── LibvirtError            libvirt could not do what was asked
    ├── InputError               2  the command line, or a file it names
    ├── PartialError             3  some requested bytes are not accounted for
    ├── UnsupportedError         4  this host, kernel or QEMU cannot
    │   └── PtraceDeniedError       the kernel does not let this process trace QEMU
    └── RefusedError             5  it could, but that would hurt the guest
        └── MonitorBusyError        another client holds the QMP socket

:class:`Code` lists every ``code`` of these errors and of a report's warnings.
"""

from __future__ import annotations

import enum
from typing import Final


class ExitStatus(enum.IntEnum):
    """Exit statuses of the command line; scripts depend on them."""

    VERIFIED = 0
    FAILED = 1
    USAGE = 2
    PARTIAL = 3
    UNSUPPORTED = 4
    REFUSED = 5


class Code(enum.StrEnum):
    """The catalogue of stable codes, as JSON has them in ``error.code`` and ``warnings[].code``.

    Codes are only ever added.
    """

    # -- one for each class of errors --------------------------------------------------
    #: It should have worked and did not.
    FAILED = "failed"
    #: The command line is wrong, or names something that does not exist.
    USAGE = "usage"
    #: Some of the requested bytes are not accounted for.
    PARTIAL = "partial"
    #: This host, kernel or QEMU cannot do what was asked.
    UNSUPPORTED = "unsupported"
    #: It could be done, but doing it now would hurt the guest or the host.
    REFUSED = "refused"

    # -- the tool itself ---------------------------------------------------------------
    #: An internal error; please report it.
    BUG = "bug"
    #: Ctrl-C, SIGTERM or SIGHUP ended the run.
    INTERRUPTED = "interrupted"
    #: The result could not be written to standard output.
    OUTPUT = "output"
    #: The process that guards a paused guest died before the guest was paused.
    GUARD = "guard"
    #: `demo` needs the lab, which is not installed.
    NO_LAB = "no-lab"

    # -- the monitor -------------------------------------------------------------------
    #: The QMP conversation failed.
    MONITOR = "monitor"
    #: Another client holds the QMP socket.
    MONITOR_BUSY = "monitor-busy"
    #: QEMU closed the QMP connection.
    MONITOR_CLOSED = "monitor-closed"
    #: QEMU understood a command and refused it.
    MONITOR_COMMAND = "monitor-command"
    #: The peer does not speak QMP.
    MONITOR_NOT_QMP = "monitor-not-qmp"
    #: The peer sent no QMP greeting.
    MONITOR_SILENT = "monitor-silent"
    #: QEMU did not answer a command in time.
    MONITOR_TIMEOUT = "monitor-timeout"
    #: QEMU's description of guest memory could not be understood, or contradicts itself.
    LAYOUT = "layout"
    #: The memory map kept changing while it was read.
    LAYOUT_UNSTABLE = "layout-unstable"

    # -- the process -------------------------------------------------------------------
    #: QEMU, or one of its threads or descriptors, does not exist any more.
    QEMU_GONE = "qemu-gone"
    #: A file of /proc could not be read, or has an unknown form.
    PROC = "proc"
    #: A file of /proc may not be read.
    PROC_PERMISSION = "proc-permission"
    #: The monitor and the process disagree: another process owns the vCPU threads.
    PROXY = "proxy"
    #: QEMU cannot be seen from this pid namespace.
    PID_NAMESPACE = "pid-namespace"
    #: QEMU runs on another host.
    OTHER_HOST = "other-host"
    #: A descriptor of QEMU's could not be duplicated.
    PIDFD = "pidfd"
    #: QEMU has nothing mapped where guest RAM should be.
    UNMAPPED = "unmapped"

    # -- KVM ---------------------------------------------------------------------------
    #: /dev/kvm cannot be opened.
    NO_KVM = "no-kvm"
    #: The guest does not run under KVM.
    NOT_KVM = "not-kvm"
    #: This machine is not x86-64.
    NOT_X86 = "not-x86"
    #: This kernel's KVM has no KVM_PRE_FAULT_MEMORY.
    NO_CAPABILITY = "no-capability"

    # -- agents ------------------------------------------------------------------------
    #: The helper inside QEMU could not be started, or stopped answering.
    AGENT = "agent"
    #: A helper left QEMU before its work was done.
    AGENT_LEFT = "agent-left"
    #: Another client is prefaulting this QEMU.
    BUSY_AGENT = "busy-agent"
    #: The kernel does not let this process trace QEMU.
    PTRACE_DENIED = "ptrace-denied"
    #: A security module forbids executable anonymous memory in QEMU.
    EXECMEM = "execmem"
    #: QEMU runs with a hardware shadow stack.
    SHADOW_STACK = "shadow-stack"
    #: QEMU's libc has no instructions that the attach agent knows.
    UNKNOWN_LIBC = "unknown-libc"
    #: QEMU's main stack is not laid out as expected.
    UNKNOWN_LAYOUT = "unknown-layout"
    #: The plugin is not loaded in this QEMU, or not part of this installation.
    NO_PLUGIN = "no-plugin"
    #: The plugin in this QEMU is of another version.
    PLUGIN_VERSION = "plugin-version"
    #: The plugin's control socket cannot be used.
    CONTROL_SOCKET = "control-socket"
    #: LD_PRELOAD has no effect on a program that raises privileges.
    SECURE_EXECUTION = "secure-execution"
    #: LD_PRELOAD has no effect on a statically linked program.
    STATIC_PROGRAM = "static-program"
    #: QEMU has no x-kvm-prefault-memory.
    NO_QMP_COMMAND = "no-qmp-command"

    # -- the guest ---------------------------------------------------------------------
    #: The guest is in a state in which it cannot run.
    GUEST_STATE = "guest-state"
    #: The guest runs already.
    RUNNING = "running"
    #: Something else resumed the guest while it was being prefaulted.
    RESUMED = "resumed"
    #: The guest's memory is still being loaded.
    INCOMING = "incoming"
    #: No migration or restore is awaited.
    NOT_INCOMING = "not-incoming"
    #: A migration is under way, or the guest has migrated away.
    MIGRATION = "migration"
    #: The incoming migration failed.
    MIGRATION_FAILED = "migration-failed"
    #: The migration may go on as postcopy.
    POSTCOPY = "postcopy"
    #: Dirty pages are being logged.
    DIRTY_LOGGING = "dirty-logging"
    #: The host has not enough memory for what would be populated.
    NO_MEMORY = "no-memory"

    # -- libvirt -----------------------------------------------------------------------
    #: libvirt could not do what was asked.
    LIBVIRT = "libvirt"
    #: There is no such domain.
    NO_DOMAIN = "no-domain"
    #: Neither virsh nor libvirt's Python module is installed.
    NO_LIBVIRT = "no-libvirt"
    #: libvirt's Python module is not installed.
    NO_LIBVIRT_PYTHON = "no-libvirt-python"
    #: libvirt's daemon does not answer.
    NO_LIBVIRTD = "no-libvirtd"
    #: prometheus_client is not installed.
    NO_PROMETHEUS = "no-prometheus"
    #: The domain's QEMU was not found.
    NO_QEMU = "no-qemu"
    #: The plugin is not where the domain would load it from.
    NOT_INSTALLED = "not-installed"
    #: The domain loads the plugin by LD_PRELOAD already.
    PRELOADED = "preloaded"
    #: A domain's XML could not be understood.
    BAD_XML = "bad-xml"

    # -- warnings of a report ----------------------------------------------------------
    #: The guest's firmware has yet to run, and will have stage-2 tables dropped.
    FIRMWARE_AHEAD = "firmware-ahead"
    #: KVM can never use huge pages for some sections.
    NEVER_HUGE = "never-huge"
    #: EPT has no accessed/dirty bits: each prefaulted page still takes one exit.
    NO_EPT_AD = "no-ept-ad"
    #: kvm.nx_huge_pages is on.
    NX_HUGE_PAGES = "nx-huge-pages"
    #: Only pages that were present were prefaulted.
    RESIDENT_ONLY = "resident-only"
    #: The memory layout changed during the run.
    LAYOUT_CHANGED = "layout-changed"
    #: vCPUs ran nested guests.
    GUEST_MODE = "guest-mode"
    #: Some vCPUs could not be used.
    VCPU_UNUSABLE = "vcpu-unusable"
    #: This QEMU or kernel has no counters.
    NO_COUNTERS = "no-counters"
    #: Stage-2 entries were dropped again during the run.
    ZAPPED = "zapped"
    #: The guest was reset during the run.
    RESET = "reset"


class QemuPrefaultError(Exception):
    """Base of all errors of this package.

    :param cause: what failed and on what, one sentence without a full stop.
    :param remedy: what the operator can do now; may be several lines.
    :param code: a stable, machine-readable name (kebab-case), used in JSON; see :class:`Code`.
    """

    exit_status = ExitStatus.FAILED
    code: str = Code.FAILED

    def __init__(self, cause: str, remedy: str = "", *, code: str | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.cause}\n{self.remedy}" if self.remedy else self.cause


class FailedError(QemuPrefaultError):
    """It should have worked and did not."""


class MonitorError(FailedError):
    """The QMP conversation with QEMU failed."""

    code = Code.MONITOR


class CommandError(MonitorError):
    """QEMU understood a command and refused it.

    :ivar error_class: QMP's error class, e.g. ``CommandNotFound``.
    :ivar desc: QEMU's own words.
    """

    code = Code.MONITOR_COMMAND

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__(f"QEMU refused {command}: {desc}")
        self.error_class = error_class
        self.desc = desc


_REMEDY_PEER: Final = "check that the socket is QEMU's own QMP monitor, then report this answer"


class LayoutError(FailedError):
    """The monitor's description of guest memory could not be understood, or contradicts itself."""

    code = Code.LAYOUT

    def __init__(self, cause: str, remedy: str = _REMEDY_PEER) -> None:
        super().__init__(cause, remedy)


class GoneError(FailedError):
    """QEMU's process (or one of its threads) does not exist any more."""

    code = Code.QEMU_GONE


class AgentError(FailedError):
    """The helper inside QEMU could not be started, or stopped answering."""

    code = Code.AGENT


class LibvirtError(FailedError):
    """libvirt could not do what was asked; its own words are the cause."""

    code = Code.LIBVIRT


class InputError(QemuPrefaultError):
    """The command line is wrong, or names something that is not there."""

    exit_status = ExitStatus.USAGE
    code = Code.USAGE


class PartialError(QemuPrefaultError):
    """Some of the requested bytes are not accounted for."""

    exit_status = ExitStatus.PARTIAL
    code = Code.PARTIAL


class UnsupportedError(QemuPrefaultError):
    """This host, kernel or QEMU cannot do what was asked."""

    exit_status = ExitStatus.UNSUPPORTED
    code = Code.UNSUPPORTED


class PtraceDeniedError(UnsupportedError):
    """The kernel does not let this process trace QEMU."""

    code = Code.PTRACE_DENIED


class RefusedError(QemuPrefaultError):
    """It could be done, but doing it now would hurt the guest or the host."""

    exit_status = ExitStatus.REFUSED
    code = Code.REFUSED


class MonitorBusyError(RefusedError):
    """Another client holds the QMP socket."""

    code = Code.MONITOR_BUSY
