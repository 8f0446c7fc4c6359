# SPDX-License-Identifier: GPL-2.0-or-later
"""The exceptions of this package, the exit statuses, and the stable error codes.

Each exception has a cause and a remedy. The cause names the failed operation, and the object on
which it failed. Each direct subclass of ``QemuPrefaultError`` makes the command line exit with the
status in the second column::

    QemuPrefaultError
    ├── FailedError              1  a step of the run failed
    │   ├── MonitorError            the QMP connection failed
    │   │   └── CommandError        QEMU returned an error for a QMP command
    │   ├── LayoutError             QEMU's description of guest memory is unusable
    │   ├── GoneError               QEMU, or one of its threads, has exited
    │   ├── AgentError              the helper inside QEMU failed
    │   └── LibvirtError            libvirt failed or refused a request
    ├── InputError               2  the command line, or a file that it names, is invalid
    ├── PartialError             3  some requested bytes were not prefaulted or not verified
    ├── UnsupportedError         4  this host, kernel or QEMU lacks a feature
    │   └── PtraceDeniedError       the kernel does not allow this process to trace QEMU
    └── RefusedError             5  prefaulting now would harm the guest or the host
        └── MonitorBusyError        another client holds the QMP socket

:class:`Code` lists every ``code`` of these errors and of a report's warnings.
"""

from __future__ import annotations

import enum
from typing import Final

#: The remedy if this process has no free file descriptors.
REMEDY_OPEN_FILES: Final = (
    "raise the limit on the files that qemu-prefault may open (ulimit -n, fs.file-max)"
)


class ExitStatus(enum.IntEnum):
    """The exit statuses of the command line, whose values never change."""

    #: Every requested byte was prefaulted and verified.
    VERIFIED = 0
    #: A step of the run failed.
    FAILED = 1
    #: The command line is invalid, or names an object that does not exist.
    USAGE = 2
    #: Some of the requested bytes were not prefaulted or could not be verified.
    PARTIAL = 3
    #: This host, kernel or QEMU lacks a feature that the run needs.
    UNSUPPORTED = 4
    #: Prefaulting now would harm the guest or the host.
    REFUSED = 5


class Code(enum.StrEnum):
    """The stable values of ``error.code`` and ``warnings[].code`` in JSON output.

    New codes may be added. Existing codes are never renamed or removed.
    """

    # --- default codes of the exception classes ---
    #: A step of the run failed.
    FAILED = "failed"
    #: The command line is invalid, or names an object that does not exist.
    USAGE = "usage"
    #: Some of the requested bytes were not prefaulted or could not be verified.
    PARTIAL = "partial"
    #: This host, kernel or QEMU lacks a feature that the run needs.
    UNSUPPORTED = "unsupported"
    #: Prefaulting now would harm the guest or the host.
    REFUSED = "refused"

    # --- the tool itself ---
    #: An internal error. Please report it.
    BUG = "bug"
    #: Ctrl-C, SIGTERM or SIGHUP ended the run.
    INTERRUPTED = "interrupted"
    #: The result could not be written to stdout.
    OUTPUT = "output"
    #: The process that would resume the guest exited before the guest was paused.
    GUARD = "guard"
    #: The ``demo`` command needs qemu-prefault-lab, which is not installed.
    NO_LAB = "no-lab"

    # --- the monitor ---
    #: The QMP connection failed.
    MONITOR = "monitor"
    #: Another client holds the QMP socket.
    MONITOR_BUSY = "monitor-busy"
    #: QEMU closed the QMP connection.
    MONITOR_CLOSED = "monitor-closed"
    #: QEMU returned an error for a QMP command.
    MONITOR_COMMAND = "monitor-command"
    #: The peer is not a QMP server.
    MONITOR_NOT_QMP = "monitor-not-qmp"
    #: The peer sent no QMP greeting within the time limit.
    MONITOR_SILENT = "monitor-silent"
    #: QEMU did not reply to a command within the time limit.
    MONITOR_TIMEOUT = "monitor-timeout"
    #: QEMU's description of guest memory cannot be parsed or is inconsistent.
    LAYOUT = "layout"
    #: The memory map changed on every attempt to read it.
    LAYOUT_UNSTABLE = "layout-unstable"

    # --- the process ---
    #: QEMU or one of its threads has exited, or QEMU has closed a file descriptor.
    QEMU_GONE = "qemu-gone"
    #: A /proc file could not be read, or has an unknown format.
    PROC = "proc"
    #: The caller has no permission to read a /proc file.
    PROC_PERMISSION = "proc-permission"
    #: The process behind the socket is not QEMU: it does not own the vCPU threads.
    PROXY = "proxy"
    #: QEMU is not visible in this pid namespace.
    PID_NAMESPACE = "pid-namespace"
    #: QEMU runs on another host.
    OTHER_HOST = "other-host"
    #: A QEMU file descriptor could not be duplicated with pidfd_getfd(2).
    PIDFD = "pidfd"
    #: QEMU has no mapping at the address that it reports for guest RAM.
    UNMAPPED = "unmapped"

    # --- KVM ---
    #: /dev/kvm cannot be opened.
    NO_KVM = "no-kvm"
    #: The guest does not run under KVM.
    NOT_KVM = "not-kvm"
    #: This machine is not x86-64.
    NOT_X86 = "not-x86"
    #: This kernel's KVM does not support KVM_PRE_FAULT_MEMORY.
    NO_CAPABILITY = "no-capability"

    # --- agents ---
    #: The helper inside QEMU could not be started, or stopped responding.
    AGENT = "agent"
    #: A helper thread in QEMU exited before its batch was complete.
    AGENT_LEFT = "agent-left"
    #: Another client is prefaulting this QEMU.
    BUSY_AGENT = "busy-agent"
    #: The kernel does not allow this process to trace QEMU.
    PTRACE_DENIED = "ptrace-denied"
    #: A security module denies executable anonymous memory in QEMU.
    EXECMEM = "execmem"
    #: QEMU's seccomp filter cannot be read, or denies a system call that a helper needs.
    SECCOMP = "seccomp"
    #: The stack of the thread that starts helpers is too small.
    SMALL_STACK = "small-stack"
    #: QEMU runs with a hardware shadow stack.
    SHADOW_STACK = "shadow-stack"
    #: QEMU's libc does not contain the instructions that the attach agent uses.
    UNKNOWN_LIBC = "unknown-libc"
    #: QEMU's main stack does not have the expected layout.
    UNKNOWN_LAYOUT = "unknown-layout"
    #: The plugin is not loaded in this QEMU, or is missing from this installation.
    NO_PLUGIN = "no-plugin"
    #: The plugin in this QEMU is from another version of qemu-prefault.
    PLUGIN_VERSION = "plugin-version"
    #: The plugin's control socket cannot be used.
    CONTROL_SOCKET = "control-socket"
    #: LD_PRELOAD has no effect on a program with set-user-id bits or file capabilities.
    SECURE_EXECUTION = "secure-execution"
    #: LD_PRELOAD has no effect on a statically linked program.
    STATIC_PROGRAM = "static-program"
    #: QEMU has no x-kvm-prefault-memory QMP command.
    NO_QMP_COMMAND = "no-qmp-command"

    # --- the guest ---
    #: The guest cannot run in its current run state.
    GUEST_STATE = "guest-state"
    #: The guest is already running.
    RUNNING = "running"
    #: Another program resumed the guest during the prefault.
    RESUMED = "resumed"
    #: The guest's memory is still being loaded.
    INCOMING = "incoming"
    #: QEMU is not waiting for an incoming migration or restore.
    NOT_INCOMING = "not-incoming"
    #: A migration is in progress, or the guest has migrated to another QEMU.
    MIGRATION = "migration"
    #: The incoming migration failed.
    MIGRATION_FAILED = "migration-failed"
    #: The migration can switch to postcopy.
    POSTCOPY = "postcopy"
    #: KVM is logging dirty pages.
    DIRTY_LOGGING = "dirty-logging"
    #: QEMU is so close to a limit on threads, mappings or address space that helper threads could
    #: reach the limit.
    NO_TASKS = "no-tasks"
    #: QEMU's cgroup cannot be read, so its limits are unknown.
    HIDDEN_CGROUP = "hidden-cgroup"
    #: The host does not have enough memory to populate the guest's RAM.
    NO_MEMORY = "no-memory"

    # --- libvirt ---
    #: libvirt failed or refused a request.
    LIBVIRT = "libvirt"
    #: The domain does not exist.
    NO_DOMAIN = "no-domain"
    #: Neither virsh nor libvirt's Python module is installed.
    NO_LIBVIRT = "no-libvirt"
    #: libvirt's Python module is not installed.
    NO_LIBVIRT_PYTHON = "no-libvirt-python"
    #: The libvirt daemon does not respond.
    NO_LIBVIRTD = "no-libvirtd"
    #: prometheus_client is not installed.
    NO_PROMETHEUS = "no-prometheus"
    #: The QEMU process of the domain was not found.
    NO_QEMU = "no-qemu"
    #: The plugin does not exist at the path from which the domain would load it.
    NOT_INSTALLED = "not-installed"
    #: Another user than root can change a program or a plugin that root or QEMU would run.
    UNTRUSTED_PATH = "untrusted-path"
    #: The domain already loads the plugin with LD_PRELOAD.
    PRELOADED = "preloaded"
    #: The domain XML could not be parsed.
    BAD_XML = "bad-xml"

    # --- warnings of a report ---
    #: The guest's firmware has not finished, so KVM will drop stage-2 tables.
    FIRMWARE_AHEAD = "firmware-ahead"
    #: KVM can never use huge pages for some sections.
    NEVER_HUGE = "never-huge"
    #: EPT has no accessed/dirty bits, so the first access to each prefaulted page causes one exit.
    NO_EPT_AD = "no-ept-ad"
    #: kvm.nx_huge_pages is on.
    NX_HUGE_PAGES = "nx-huge-pages"
    #: Only pages that were already present were prefaulted.
    RESIDENT_ONLY = "resident-only"
    #: The memory layout changed during the run.
    LAYOUT_CHANGED = "layout-changed"
    #: vCPUs were running nested guests.
    GUEST_MODE = "guest-mode"
    #: The caller has no permission to change a helper's scheduling, CPUs or cgroup.
    HELPER_PLACEMENT = "helper-placement"
    #: A limit on QEMU's CPU time makes the run slower.
    CPU_QUOTA = "cpu-quota"
    #: Helpers made no progress for more than 2 seconds.
    NO_PROGRESS = "no-progress"
    #: Some vCPUs could not be used.
    VCPU_UNUSABLE = "vcpu-unusable"
    #: This QEMU or kernel does not provide KVM's counters, so the result is not verified.
    NO_COUNTERS = "no-counters"
    #: KVM dropped stage-2 entries during the run.
    ZAPPED = "zapped"
    #: The guest was reset during the run.
    RESET = "reset"
    #: Free memory became scarce while guest RAM was being populated.
    MEMORY_SHORT = "memory-short"


class QemuPrefaultError(Exception):
    """The base class of all exceptions in this package.

    :param cause: A sentence without a full stop. It names the failed operation, and the object on
        which it failed.
    :param remedy: The action that the operator can take. The text may be empty, or may contain
        several lines.
    :param code: The stable name of the error in JSON, which is a member of :class:`Code`. The
        default is the code of the class.
    :ivar exit_status: The exit status of the command line for this error.
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
    """A step of the run failed."""


class MonitorError(FailedError):
    """The QMP connection to QEMU failed."""

    code = Code.MONITOR


class CommandError(MonitorError):
    """QEMU returned an error for a QMP command.

    :param command: The name of the QMP command.
    :ivar error_class: The class of the QMP error, for example ``CommandNotFound``.
    :ivar desc: QEMU's error message.
    """

    code = Code.MONITOR_COMMAND

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__(f"QEMU refused {command}: {desc}", self._remedy(error_class, desc))
        self.error_class = error_class
        self.desc = desc

    @staticmethod
    def _remedy(error_class: str, desc: str) -> str:
        if error_class == "CommandNotFound" or "machine initialization" in desc:
            return (
                "connect to the monitor of a QEMU that has a guest: qemu-storage-daemon never has "
                "one, and a QEMU started with -preconfig has one only after x-exit-preconfig"
            )
        return "see QEMU's log; the guest's run state is the same as before the run"


_REMEDY_PEER: Final = "check that the socket is QEMU's own QMP monitor, then report this reply"


class LayoutError(FailedError):
    """QEMU's description of guest memory is inconsistent or cannot be parsed."""

    code = Code.LAYOUT

    def __init__(self, cause: str, remedy: str = _REMEDY_PEER) -> None:
        super().__init__(cause, remedy)


class GoneError(FailedError):
    """QEMU, or one of its threads, has exited."""

    code = Code.QEMU_GONE


class AgentError(FailedError):
    """The helper inside QEMU could not be started, or it stopped responding."""

    code = Code.AGENT


class LibvirtError(FailedError):
    """libvirt failed or refused a request.

    The ``cause`` attribute contains libvirt's message.
    """

    code = Code.LIBVIRT


class InputError(QemuPrefaultError):
    """The command line is invalid, or names an object that does not exist."""

    exit_status = ExitStatus.USAGE
    code = Code.USAGE


class PartialError(QemuPrefaultError):
    """Some of the requested bytes were not prefaulted or could not be verified."""

    exit_status = ExitStatus.PARTIAL
    code = Code.PARTIAL


class UnsupportedError(QemuPrefaultError):
    """This host, kernel or QEMU lacks a feature that the run needs."""

    exit_status = ExitStatus.UNSUPPORTED
    code = Code.UNSUPPORTED


class PtraceDeniedError(UnsupportedError):
    """The kernel does not allow this process to trace QEMU."""

    code = Code.PTRACE_DENIED


class RefusedError(QemuPrefaultError):
    """Prefaulting now would harm the guest or the host."""

    exit_status = ExitStatus.REFUSED
    code = Code.REFUSED


class MonitorBusyError(RefusedError):
    """Another client holds the QMP socket."""

    code = Code.MONITOR_BUSY
