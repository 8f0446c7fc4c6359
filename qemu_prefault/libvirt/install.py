# SPDX-License-Identifier: GPL-2.0-or-later
"""Install the files that libvirt's QEMU needs on a host.

The AppArmor profile of guests (abstractions/base, abstractions/libvirt-qemu) allows QEMU to map
shared objects only below /usr/lib. Therefore :func:`install` copies the plugin there. The profile
allows QEMU to create files only in the domain's directory, which is QEMU's ``$HOME``
(/var/lib/libvirt/qemu/domain-ID-NAME). Therefore the plugin creates its control socket there. The
plugin also reads files in ``/proc/self`` and /sys/fs/cgroup, which requires an additional rule.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FailedError, UnsupportedError
from .domain_xml import PLUGIN_NAME

#: Path of the plugin's control socket, below QEMU's ``$HOME``.
CONTROL_SOCKET = "~/qemu-prefault.sock"
#: A file that exists if the host has AppArmor profiles for libvirt's guests.
APPARMOR_ABSTRACTION = Path("etc/apparmor.d/abstractions/libvirt-qemu")
APPARMOR_RULE = Path("etc/apparmor.d/abstractions/libvirt-qemu.d/qemu-prefault")
HOOK = Path("etc/libvirt/hooks/qemu.d/50-qemu-prefault")
UNIT = Path("etc/systemd/system/qemu-prefault-watch.service")
CONFIG = Path("/etc/qemu-prefault/libvirt.toml")


#: AppArmor rule for the files that the plugin reads. These files show which pages are present,
#: which memory must stay absent, and how much memory and how many tasks remain.
RULE_TEXT = """\
# The files that the plugin reads inside QEMU. Installed by `qemu-prefault libvirt install`.
  owner @{PROC}/@{pid}/{pagemap,smaps,cgroup,mountinfo,status,uid_map,statm,maps} r,
  owner @{PROC}/@{pid}/fd/ r,
  @{PROC}/{,loadavg} r,
  @{PROC}/sys/vm/{min_free_kbytes,overcommit_memory,max_map_count} r,
  @{PROC}/sys/kernel/{overflowuid,threads-max,pid_max} r,
  /sys/fs/cgroup/{,**} r,
  /sys/devices/system/node/{,**} r,
  /sys/kernel/mm/hugepages/{,**} r,
"""


#: The hook. It always exits with status 0, because libvirt stops the guest if a hook fails. The
#: hook starts Python only if the domain or the host has a configuration, because libvirt waits for
#: the hook. ``timeout`` also ends the confinement by libvirtd's AppArmor profile, because that
#: profile runs programs in /usr/bin without confinement.
HOOK_TEXT = """\
#!/bin/sh
# Installed by `qemu-prefault libvirt install --hook`.
case "$2 $3" in
"started begin" | "restore begin" | "migrate begin" | "release end") ;;
*) exit 0 ;;
esac
xml=$(/usr/bin/head -c 16777217)
case $xml in
*qemu-prefault*) ;;
*) [ -e {config} ] || exit 0 ;;
esac
printf '%s\\n' "$xml" | /usr/bin/timeout -k 5 60 {program} libvirt hook "$@"
exit 0
"""


#: The systemd unit of ``libvirt watch``. Without ``--act``, the daemon traces no process. It needs
#: CAP_SYS_PTRACE to read /proc/PID/fd of QEMU, CAP_DAC_READ_SEARCH for debugfs, and
#: CAP_DAC_OVERRIDE to connect to the plugins' sockets, which belong to QEMU's user.
UNIT_TEXT = """\
[Unit]
Description=Watch libvirt guests for qemu-prefault, and export Prometheus metrics
Documentation=man:qemu-prefault-libvirt(1)
After=libvirtd.service virtqemud.service

[Service]
ExecStart={program} libvirt watch --listen 127.0.0.1:9469
Restart=on-failure
RestartSec=5
UMask=0077

MemoryMax=512M
TasksMax=2048

CapabilityBoundingSet=CAP_SYS_PTRACE CAP_DAC_READ_SEARCH CAP_DAC_OVERRIDE
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome={home}
PrivateTmp=yes
PrivateDevices=yes
DevicePolicy=closed
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_UNIX AF_NETLINK AF_INET AF_INET6
IPAddressDeny=any
IPAddressAllow=localhost
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True, slots=True)
class Installed:
    """An installed file, and whether :func:`install` had to write it."""

    path: Path
    changed: bool


def library_directory(root: Path = Path("/")) -> Path:
    """Return the directory in which the distribution installs shared objects."""
    for name in ("usr/lib/x86_64-linux-gnu", "usr/lib64"):
        if (root / name).is_dir() and not (root / name).is_symlink():
            return root / name
    return root / "usr/lib"


def installed_plugin(root: Path = Path("/")) -> Path:
    """Return the path to which :func:`install` copies the plugin."""
    return library_directory(root) / "qemu-prefault" / PLUGIN_NAME


def is_current(path: Path) -> bool:
    """Return whether the file is identical to the plugin of this qemu-prefault.

    :raises UnsupportedError: If this installation of qemu-prefault has no plugin.
    """
    from ..agents.plugin import plugin_path  # noqa: PLC0415

    try:
        return path.read_bytes() == plugin_path().read_bytes()
    except FileNotFoundError:
        return False


def install(root: Path = Path("/"), *, hook: bool = False, unit: bool = False) -> list[Installed]:
    """Install the plugin, and the AppArmor rule if the host uses AppArmor.

    :param root: The root directory of the installation.
    :param hook: Whether to install the hook as well.
    :param unit: Whether to install the daemon's systemd unit as well.
    :raises RefusedError: If another user than root can change the program that the hook or the unit
        starts, or a directory of a file (code ``untrusted-path``). Nothing was written.
    :raises FailedError: If a file could not be written.
    """
    from ..agents.plugin import plugin_path  # noqa: PLC0415 - the hook does not need it
    from .trusted_path import check_program, check_trusted  # noqa: PLC0415

    program = program_words()
    if hook or unit:
        _check_characters(program, unit)
        check_program(program)
    if root.resolve() == Path("/"):  # otherwise the files are for another root directory
        wanted = {installed_plugin(root): True, root / HOOK: hook, root / UNIT: unit}
        for path in (path for path, asked in wanted.items() if asked):
            check_trusted(path.absolute())
    done = [_write(installed_plugin(root), plugin_path().read_bytes(), 0o644)]
    if (root / APPARMOR_ABSTRACTION).exists():
        done.append(_write(root / APPARMOR_RULE, RULE_TEXT.encode(), 0o644))
    if hook:
        text = HOOK_TEXT.format(program=shlex.join(program), config=CONFIG)
        done.append(_write(root / HOOK, text.encode(), 0o755))
    if unit:
        done.append(_write(root / UNIT, unit_text(program).encode(), 0o644))
    return done


def check_plugin(path: Path, uri: str | None) -> None:
    """Check that only root can change a plugin that a domain loads.

    The QEMU of a user's own libvirt daemon (``qemu:///session``) may load a plugin of this user.

    :param uri: The URI of the libvirt connection, or None for the default URI.
    :raises RefusedError: If another user can change the plugin (code ``untrusted-path``).
    """
    from .connection import default_uri  # noqa: PLC0415
    from .trusted_path import ROOT_ONLY, check_trusted  # noqa: PLC0415

    session = default_uri(uri).partition("?")[0].endswith("/session")
    check_trusted(path, ROOT_ONLY | {os.geteuid()} if session else ROOT_ONLY)


def uninstall(root: Path = Path("/")) -> list[Path]:
    """Remove the files that :func:`install` wrote.

    Afterwards, domains that load the plugin cannot start.

    :raises FailedError: If a file could not be removed.
    """
    gone = []
    paths: Sequence[Path] = (installed_plugin(root), root / APPARMOR_RULE, root / HOOK, root / UNIT)
    for path in paths:
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _cannot("removed", path, error) from error
        gone.append(path)
    with contextlib.suppress(OSError):
        installed_plugin(root).parent.rmdir()
    return gone


def program_words() -> list[str]:
    """Return the command that starts qemu-prefault."""
    import shutil  # noqa: PLC0415

    found = shutil.which("qemu-prefault")
    if found:
        return [os.path.abspath(found)]
    # Not -I, with which Python would not find an installation in root's user site directory.
    return [sys.executable, "-E", "-P", "-m", "qemu_prefault"]


def unit_text(program: Sequence[str]) -> str:
    """Return the systemd unit of ``libvirt watch``.

    :param program: The command that starts qemu-prefault.
    """
    in_home = any(word.startswith(("/home/", "/root/", "/run/user/")) for word in program)
    return UNIT_TEXT.format(
        program=" ".join(map(_unit_quote, program)), home="read-only" if in_home else "yes"
    )


def _unit_quote(word: str) -> str:
    """Quote a word for ExecStart= (systemd.service(5) and systemd.syntax(7)).

    The word must have passed :func:`_check_characters`.
    """
    word = word.replace("%", "%%")
    return f'"{word}"' if " " in word or ";" in word else word


def _check_characters(words: Sequence[str], unit: bool) -> None:
    # systemd replaces variables in the arguments of a transient unit (systemd-run(1)). It refuses
    # quotes and backslashes in the path of a program (string_is_safe() in config_parse_exec(),
    # src/core/load-fragment.c).
    refused = "$" + ("\"'\\" if unit else "")
    for word in words:
        if not word.isprintable() or any(character in word for character in refused):
            raise UnsupportedError(
                "the path of this installation contains a control character or one of "
                f"{' '.join(refused)}: {word!r}",
                "install qemu-prefault in a path without these characters",
            )


def _write(path: Path, content: bytes, mode: int) -> Installed:
    try:
        if path.read_bytes() == content:
            return Installed(path, False)
    except OSError:
        pass
    # Rename a new file over the old one, because a running QEMU maps the old file.
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(beside, flags, 0o600), "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
        os.replace(beside, path)
    except OSError as error:
        raise _cannot("written", path, error) from error
    return Installed(path, True)


def _cannot(what: str, path: Path, error: OSError) -> FailedError:
    return FailedError(
        f"{path} could not be {what}: {error.strerror}",
        "run this command as root, and check that the file system is writable and not full",
    )
