# SPDX-License-Identifier: GPL-2.0-or-later
"""What libvirt calls when a domain starts: /etc/libvirt/hooks/qemu.d/50-qemu-prefault.

libvirt waits for its hooks, and a hook that fails ends the guest. So:

* It never calls libvirt, which would wait for the very job it is called from. What it needs
  comes from the XML on stdin, the pid file, and ``/proc``.
* What takes longer goes to a process of its own, a transient unit where systemd is.
* Whatever happens, it returns 0, and logs. ``reconnect`` does nothing at all.

The moments, in libvirt's order (src/qemu/qemu_process.c, qemu_saveimage.c, qemu_migration.c):

================  =====================  ==========================================
``restore begin``  stdin has XML, and so  a restore is under way; if the plugin it
``migrate begin``  may stdout             names is not on this host it is left out
``started begin``  after a boot           the vCPUs run already
                   after a restore        RAM is loaded, the vCPUs wait for us
                   of a migration         RAM is not there yet
``release end``                           the domain has ended
================  =====================  ==========================================
"""

from __future__ import annotations

import contextlib
import os
import sys
import syslog
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import QemuPrefaultError
from . import domain_xml
from .domain_xml import Domain
from .hook_config import HookConfig, LifecycleEvent, When, read
from .install import program_words

if TYPE_CHECKING:
    from ..host.procfs import Process
    from .prelaunch import PrelaunchResult

MARKS = Path("/run/qemu-prefault")
"""A file for each domain that is being restored or migrates in, until it has started."""
SYSTEMD = Path("/run/systemd/system")
LONGEST_XML = 16 << 20

Log = Callable[[str], None]


def main(arguments: Sequence[str], stdin: int = 0) -> bytes:
    """The hook. Returns what goes to stdout: other XML, or nothing.

    It raises nothing: what goes wrong is in the log.

    :param arguments: the domain's name, the operation, its phase, and a reason.
    """
    name = arguments[0] if arguments else "?"
    log = _logger(name)
    operation = " ".join(arguments[1:3])
    try:
        if operation in ("restore begin", "migrate begin"):
            return _coming(LifecycleEvent(arguments[1]), _read_all(stdin), log)
        if operation == "started begin":
            _started(name, _read_all(stdin), log)
        elif operation == "release end":
            about = domain_xml.describe(_read_all(stdin))
            _mark(about.uuid).unlink(missing_ok=True)
    except QemuPrefaultError as error:
        log(f"{operation}: {error.cause}; {error.remedy}")
    except Exception as error:  # the guest must not suffer from it
        log(f"{operation}: {type(error).__name__}: {error}; please report this")
    return b""


def _coming(moment: LifecycleEvent, xml: bytes, log: Log) -> bytes:
    """Remember what ``started`` will not tell; leave out a plugin that is not on this host."""
    about = domain_xml.describe(xml)
    try:
        MARKS.mkdir(mode=0o700, exist_ok=True)
        _mark(about.uuid).write_text(moment.value)
    except OSError as error:
        log(f"{moment} will look like a start: {error}")
    found = domain_xml.loaded(xml)
    if found is None or os.path.exists(found.path):
        return b""
    log(f"{found.path} is not on this host: {moment} goes on without the plugin")
    return domain_xml.disable(xml).xml


def _started(name: str, xml: bytes, log: Log) -> None:
    started = time.monotonic()
    about = domain_xml.describe(xml)
    moment = _take_mark(about.uuid)
    policy = read(about)
    when = policy.at(moment)
    if when is When.OFF or not about.kvm:
        return
    # From here on it is worth to load more.
    from ..agents.plugin import find_control_socket  # noqa: PLC0415
    from .find_qemu import find_qemu  # noqa: PLC0415

    process = find_qemu(name, about.uuid)
    if find_control_socket(process) is not None:
        log(f"{moment}: QEMU (pid {process.pid}) has the plugin, which sees to it")
        return
    if when is When.NOW:
        try:
            done = _in_window(process, about, policy)
        except QemuPrefaultError as error:
            log(f"{moment}: {error.cause}; it is left for later")
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

    from .prelaunch import prefault_before_start  # noqa: PLC0415

    return asyncio.run(prefault_before_start(process, about, policy.wait, policy.populate))


def _hand_over(about: Domain, pid: int, policy: HookConfig, when: When, log: Log) -> None:
    """Let a process of its own do it, which may call libvirt and take its time."""
    import shutil  # noqa: PLC0415
    import subprocess  # noqa: PLC0415

    words = [*program_words(), "--domain", about.uuid, "--populate", policy.populate]
    if when is When.FOLLOW:
        words.append("--follow")
    if SYSTEMD.is_dir() and (systemd_run := shutil.which("systemd-run")):
        unit = f"qemu-prefault-{about.uuid}-{pid}"
        words = [systemd_run, "--no-block", "--collect", "--quiet", f"--unit={unit}",
                 f"--description=qemu-prefault of {about.name}", "--", *words]  # fmt: skip
        subprocess.run(words, stdin=subprocess.DEVNULL, check=True, timeout=10)
        log(f"handed over to {unit}.service")
        return
    if logger := shutil.which("logger"):
        script = f'"$@" 2>&1 | {logger} -t qemu-prefault'
        words = ["sh", "-c", script, "qemu-prefault", *words]
    # libvirt waits until the hook's pipes are closed, so the child must not hold them.
    child = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    child.returncode = 0  # whose end is not waited for here
    log(f"handed over to process {child.pid}")


# -- details -----------------------------------------------------------------------------


def _read_all(descriptor: int) -> bytes:
    parts = []
    while part := os.read(descriptor, 1 << 16):
        parts.append(part)
        if len(parts) > LONGEST_XML >> 16:
            break  # what is cut off is no XML, and so refused
    return b"".join(parts)


def _mark(uuid: str) -> Path:
    return MARKS / "".join(c for c in uuid if c.isalnum() or c == "-")


def _take_mark(uuid: str) -> LifecycleEvent:
    try:
        moment = LifecycleEvent(_mark(uuid).read_text())
    except (OSError, ValueError):
        return LifecycleEvent.START
    _mark(uuid).unlink(missing_ok=True)
    return moment


def _logger(name: str) -> Log:
    """To syslog, and to stderr, of which libvirt logs what a failed hook said."""
    syslog.openlog("qemu-prefault", syslog.LOG_PID, syslog.LOG_DAEMON)

    def log(text: str) -> None:
        line = "".join(c if c.isprintable() else "?" for c in f"{name}: {text}")
        syslog.syslog(syslog.LOG_INFO, line)
        with contextlib.suppress(OSError):
            print(f"qemu-prefault: {line}", file=sys.stderr)

    return log
