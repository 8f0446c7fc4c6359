# SPDX-License-Identifier: GPL-2.0-or-later
"""The libvirt hook, /etc/libvirt/hooks/qemu.d/50-qemu-prefault.

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

#: Directory with a file for each domain that is being restored or is migrating in. The hook removes
#: this file when the domain has started.
MARKS = Path("/run/qemu-prefault")
#: A directory that exists if the host runs systemd (sd_booted(3)).
SYSTEMD = Path("/run/systemd/system")
#: Maximum size of the XML on stdin, in bytes.
LONGEST_XML = 16 << 20

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
        if operation in ("restore begin", "migrate begin"):
            return _coming(LifecycleEvent(arguments[1]), _read_all(stdin), log)
        if operation == "started begin":
            _started(name, _read_all(stdin), log)
        elif operation == "release end":
            about = domain_xml.describe(_read_all(stdin))
            _mark(about.uuid).unlink(missing_ok=True)
    except QemuPrefaultError as error:
        log(f"{operation}: {error.cause}; {error.remedy}")
    except Exception as error:  # libvirt stops the guest if the hook fails
        log(f"{operation}: report this bug: {type(error).__name__}: {error}")
    return b""


def _coming(moment: LifecycleEvent, xml: bytes, log: Log) -> bytes:
    """Record the event in a file, which the hook reads at ``started begin``.

    :returns: The XML without the plugin if the plugin's file is missing, or ``b''``.
    """
    about = domain_xml.describe(xml)
    try:
        MARKS.mkdir(mode=0o700, exist_ok=True)
        _mark(about.uuid).write_text(moment.value)
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
    moment = _take_mark(about.uuid)
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

    from .prelaunch import prefault_before_start  # noqa: PLC0415

    return asyncio.run(prefault_before_start(process, about, policy.wait, policy.populate))


def _hand_over(about: Domain, pid: int, policy: HookConfig, when: When, log: Log) -> None:
    """Prefault the guest in a new process, for which libvirt does not wait."""
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
        log(f"the hook started {unit}.service to prefault the guest")
        return
    if logger := shutil.which("logger"):
        script = f'"$@" 2>&1 | {logger} -t qemu-prefault'
        words = ["sh", "-c", script, "qemu-prefault", *words]
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
    """Return a function that logs to syslog and to stderr."""
    syslog.openlog("qemu-prefault", syslog.LOG_PID, syslog.LOG_DAEMON)

    def log(text: str) -> None:
        line = "".join(c if c.isprintable() else "?" for c in f"{name}: {text}")
        syslog.syslog(syslog.LOG_INFO, line)
        with contextlib.suppress(OSError):
            print(f"qemu-prefault: {line}", file=sys.stderr)

    return log
