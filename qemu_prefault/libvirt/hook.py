# SPDX-License-Identifier: GPL-2.0-or-later
"""The program behind the libvirt hook.

libvirt executes /etc/libvirt/hooks/qemu.d/50-qemu-prefault, a shell script that starts this program
(``HOOK_TEXT`` in install.py).

libvirt waits for the hook, and stops the guest if the hook fails. Therefore the hook follows these
rules:

* The hook never calls libvirt, because such a call would wait for the libvirt job that called the
  hook. The hook reads the XML on stdin, the pid file and ``/proc`` instead.
* The hook prefaults a guest itself only if the configuration contains ``restore="now"``. Otherwise
  it starts another process, which prefaults the guest after the guest has started. If the host runs
  systemd, this process is a transient systemd unit.
* The hook logs every error and always returns 0.

libvirt calls the hook at these events, in this order (src/qemu/qemu_process.c, qemu_saveimage.c,
qemu_migration.c). The hook ignores other events, for example ``reconnect``.

``restore begin``, ``migrate begin``
    A restore or an incoming migration starts. libvirt passes the domain XML on stdin, and uses the
    XML that the hook prints. If the XML names a plugin file that does not exist on this host, the
    hook removes the plugin from the XML.
``started begin``
    QEMU is running. At a boot, the vCPUs already run. At a restore, RAM is loaded and the vCPUs
    wait until the hook returns. At a migration, RAM is not loaded yet.
``release end``
    The domain has ended.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import stat
import sys
import syslog
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from ..errors import InputError, QemuPrefaultError
from ..text import install_hooks, log_text, printable, write
from . import domain_xml
from .domain_xml import Domain
from .hook_config import HookConfig, LifecycleEvent, When, read
from .install import program_words

if TYPE_CHECKING:
    from ..host.procfs import Process
    from .prelaunch import PrelaunchResult

#: Directory with a file for each domain that is being restored or is migrating in. The hook removes
#: this file when the domain has started.
MARKS = Path("/run/qemu-prefault")
#: A directory that exists if the host runs systemd (sd_booted(3)).
SYSTEMD = Path("/run/systemd/system")
#: Maximum size of the XML on stdin, in bytes.
LONGEST_XML = 16 << 20
#: Maximum duration of a call, in seconds. timeout(1) in the script of the hook kills a call that
#: lasts longer (install.HOOK_TEXT).
LONGEST_CALL: Final = 55
#: Limits of the transient unit that prefaults a guest (systemd.resource-control(5)).
UNIT_LIMITS: Final = ("MemoryMax=1G", "TasksMax=512")

_UUID: Final = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

Log = Callable[[str], None]


def main(arguments: Sequence[str], stdin: int = 0) -> bytes:
    """Run the hook, and log errors instead of raising them.

    :param arguments: The domain's name, the operation, its phase, and further arguments.
    :param stdin: The file descriptor from which to read the domain XML.
    :returns: The changed XML to write to stdout, or ``b''`` if nothing has changed.
    """
    name = arguments[0] if arguments else "?"
    log = _logger(name)
    operation = " ".join(arguments[1:3])
    try:
        _limit_time(operation, log)
        if operation in ("restore begin", "migrate begin"):
            return _coming(LifecycleEvent(arguments[1]), _read_all(stdin), log)
        if operation == "started begin":
            _started(name, _read_all(stdin), log)
        elif operation == "release end":
            _take_mark(domain_xml.describe(_read_all(stdin)).uuid, log)
    except QemuPrefaultError as error:
        log(f"{operation}: {error.cause}; {error.remedy}")
    except Exception as error:  # libvirt stops the guest if the hook fails
        log(f"{operation}: report this bug: {type(error).__name__}: {error}")
    finally:
        signal.alarm(0)
    return b""


def _coming(moment: LifecycleEvent, xml: bytes, log: Log) -> bytes:
    """Record the event in a file, which the hook reads at ``started begin``.

    :returns: The XML without the plugin if the plugin's file is missing, or ``b''``.
    """
    about = domain_xml.describe(xml)
    try:
        with contextlib.suppress(FileExistsError):
            MARKS.mkdir(mode=0o700)
        with _marks() as directory, _open_mark(directory, about.uuid, os.O_WRONLY) as file:
            file.write(moment.value)
    except OSError as error:
        log(f"the hook will handle the {moment} as a start, because writing a file failed: {error}")
    found = domain_xml.loaded(xml)
    if found is None or os.path.exists(found.path):
        return b""
    log(
        f"the {moment} continues without the plugin, because {found.path} does not exist on this "
        "host"
    )
    return domain_xml.disable(xml).xml


def _started(name: str, xml: bytes, log: Log) -> None:
    started = time.monotonic()
    about = domain_xml.describe(xml)
    moment = _take_mark(about.uuid, log)
    policy = read(about)
    when = policy.at(moment)
    if when is When.OFF or not about.kvm:
        return
    # Import these modules late: libvirt waits for every call, and most calls return above.
    from ..agents.plugin import find_control_socket  # noqa: PLC0415
    from .find_qemu import find_qemu  # noqa: PLC0415

    process = find_qemu(name, about.uuid)
    if find_control_socket(process) is not None:
        log(f"{moment}: the hook does nothing, because QEMU (pid {process.pid}) has the plugin")
        return
    if when is When.NOW:
        try:
            done = _in_window(process, about, policy)
        except QemuPrefaultError as error:
            log(f"{moment}: {error.cause}. The guest will be prefaulted after it starts")
        else:
            log(
                f"{moment}: {done.prefaulted >> 20} of {done.requested >> 20} MiB prefaulted "
                f"before the guest runs, {done.populated >> 20} MiB populated, "
                f"in {time.monotonic() - started:.2f} s" + "".join(f"; {n}" for n in done.notes)
            )
            if done.remaining <= 0:
                return
    _hand_over(about, process.pid, policy, when, log)


def _in_window(process: Process, about: Domain, policy: HookConfig) -> PrelaunchResult:
    import asyncio  # noqa: PLC0415

    from ..logs import escape_unhandled_records  # noqa: PLC0415
    from .prelaunch import prefault_before_start  # noqa: PLC0415

    escape_unhandled_records()  # asyncio logs errors
    return asyncio.run(prefault_before_start(process, about, policy.wait, policy.populate))


def _hand_over(about: Domain, pid: int, policy: HookConfig, when: When, log: Log) -> None:
    """Prefault the guest in a new process, for which libvirt does not wait."""
    import shutil  # noqa: PLC0415
    import subprocess  # noqa: PLC0415

    if not _UUID.fullmatch(about.uuid):
        raise InputError(
            f"the domain's UUID is {about.uuid!r}", "correct the UUID: virsh edit DOMAIN"
        )
    words = [*program_words(), "--domain", about.uuid, "--populate", policy.populate]
    if when is When.FOLLOW:
        words.append("--follow")
    if SYSTEMD.is_dir() and (systemd_run := shutil.which("systemd-run")):
        unit = f"qemu-prefault-{about.uuid}-{pid}"
        words = [systemd_run, "--no-block", "--collect", "--quiet", f"--unit={unit}",
                 f"--description=qemu-prefault of {printable(about.name)}",
                 *(f"--property={limit}" for limit in UNIT_LIMITS), "--", *words]  # fmt: skip
        subprocess.run(words, stdin=subprocess.DEVNULL, check=True, timeout=10)
        log(f"the hook started {unit}.service to prefault the guest")
        return
    if logger := shutil.which("logger"):
        script = '"$@" 2>&1 | "$0" -t qemu-prefault'
        words = ["/bin/sh", "-c", script, logger, *words]
    # libvirt waits until the hook's pipes are closed, so the child must not inherit them.
    child = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    child.returncode = 0  # so that Popen does not warn: the child outlives this process
    log(f"the hook started process {child.pid} to prefault the guest")


# --- details ---


def _read_all(descriptor: int) -> bytes:
    parts = []
    while part := os.read(descriptor, 1 << 16):
        parts.append(part)
        if len(parts) > LONGEST_XML >> 16:
            break  # the parser refuses truncated XML
    return b"".join(parts)


def _limit_time(operation: str, log: Log) -> None:
    """End this process after :data:`LONGEST_CALL` seconds.

    The process can be killed at any instant, so it ends without cleaning up.
    """

    def end(*_: object) -> None:
        log(f"{operation}: the call took more than {LONGEST_CALL} s, so the hook ended it")
        os._exit(0)

    signal.signal(signal.SIGALRM, end)
    signal.alarm(LONGEST_CALL)


@contextlib.contextmanager
def _marks() -> Iterator[int]:
    """Open :data:`MARKS` for the block.

    :raises OSError: If the directory does not exist, if another user owns it or may write to it, or
        if it is a symbolic link.
    """
    directory = os.open(MARKS, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(directory)
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OSError(
                errno.EPERM,
                "another user owns the directory or may write to it; remove it",
                str(MARKS),
            )
        if found.st_mode & 0o077:
            os.fchmod(directory, 0o700)
        yield directory
    finally:
        os.close(directory)


def _open_mark(directory: int, uuid: str, flags: int) -> IO[str]:
    """Open a domain's file in :data:`MARKS`.

    :raises OSError: If the file cannot be opened, or if the UUID is malformed.
    """
    if not _UUID.fullmatch(uuid):
        raise OSError(errno.EINVAL, "the domain's UUID is malformed")
    if flags & os.O_WRONLY:
        flags |= os.O_CREAT | os.O_TRUNC
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(uuid, flags, 0o600, dir_fd=directory)
    return os.fdopen(descriptor, "w" if flags & os.O_WRONLY else "r", errors="replace")


def _take_mark(uuid: str, log: Log) -> LifecycleEvent:
    """Read and remove a domain's file, and return the event in the file."""
    try:
        with _marks() as directory:
            with _open_mark(directory, uuid, os.O_RDONLY) as file:
                text = file.read(64)
            os.unlink(uuid, dir_fd=directory)
        return LifecycleEvent(text)
    except (FileNotFoundError, ValueError):
        return LifecycleEvent.START
    except OSError as error:
        log(f"the hook handles a start, because a file could not be read: {error}")
        return LifecycleEvent.START


def _logger(name: str) -> Log:
    """Return a function that logs to syslog and to stderr."""
    install_hooks()
    syslog.openlog("qemu-prefault", syslog.LOG_PID, syslog.LOG_DAEMON)

    def log(text: str) -> None:
        line = log_text(f"{name}: {text}")
        syslog.syslog(syslog.LOG_INFO, line)
        with contextlib.suppress(OSError):
            write(line, sys.stderr, before="qemu-prefault: ")

    return log
