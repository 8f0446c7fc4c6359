# SPDX-License-Identifier: GPL-2.0-or-later
"""What libvirt's QEMUs need on a host, and where it has to lie.

AppArmor's profile for guests (abstractions/base, abstractions/libvirt-qemu) lets QEMU map
shared objects below /usr/lib only, never from a virtual environment, so the plugin is copied
there. It lets QEMU create files in the domain's own directory only, which is its ``$HOME``
(/var/lib/libvirt/qemu/domain-ID-NAME), so the control socket is made there. What the plugin
reads of ``/proc/self`` beyond that takes a rule of its own.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FailedError, UnsupportedError
from .domain_xml import PLUGIN_NAME

CONTROL_SOCKET = "~/qemu-prefault.sock"
APPARMOR_ABSTRACTION = Path("etc/apparmor.d/abstractions/libvirt-qemu")
APPARMOR_RULE = Path("etc/apparmor.d/abstractions/libvirt-qemu.d/qemu-prefault")
HOOK = Path("etc/libvirt/hooks/qemu.d/50-qemu-prefault")
UNIT = Path("etc/systemd/system/qemu-prefault-watch.service")
CONFIG = Path("/etc/qemu-prefault/libvirt.toml")


#: Which pages may be prefaulted, what memory may be absent on purpose, and what is left of
#: the cgroup's memory: without these the plugin does less, or more than it should.
RULE_TEXT = """\
# qemu-prefault: what its plugin reads inside QEMU. Installed by `qemu-prefault libvirt install`.
  owner @{PROC}/@{pid}/{pagemap,smaps,cgroup} r,
  /sys/fs/cgroup/** r,
"""


# Whatever happens to what it starts, the hook succeeds: libvirt would end the guest. `timeout`
# also is what leaves libvirtd's AppArmor profile, which lets programs in /usr/bin do so. Python
# is started only where there may be something to do: libvirt waits for every call.
HOOK_TEXT = """\
#!/bin/sh
# Installed by `qemu-prefault libvirt install --hook`.
case "$2 $3" in
"started begin" | "restore begin" | "migrate begin" | "release end") ;;
*) exit 0 ;;
esac
xml=$(cat)
case $xml in
*qemu-prefault*) ;;
*) [ -e {config} ] || exit 0 ;;
esac
printf '%s\\n' "$xml" | /usr/bin/timeout -k 5 60 {program} libvirt hook "$@"
exit 0
"""


UNIT_TEXT = """\
[Unit]
Description=Prefault libvirt's guests, and tell Prometheus of them
Documentation=man:qemu-prefault(1)
After=libvirtd.service virtqemud.service

[Service]
ExecStart={program} libvirt watch --listen 127.0.0.1:9469
Restart=on-failure
RestartSec=5

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True, slots=True)
class Installed:
    """A file that :func:`install` looks after, and whether it had to be written."""

    path: Path
    changed: bool


def library_directory(root: Path = Path("/")) -> Path:
    """Where this distribution has its shared objects: multiarch, lib64, or lib."""
    for name in ("usr/lib/x86_64-linux-gnu", "usr/lib64"):
        if (root / name).is_dir() and not (root / name).is_symlink():
            return root / name
    return root / "usr/lib"


def installed_plugin(root: Path = Path("/")) -> Path:
    """Where the plugin is, or would be, for libvirt's QEMUs."""
    return library_directory(root) / "qemu-prefault" / PLUGIN_NAME


def is_current(path: Path) -> bool:
    """Whether the plugin there is the one this version came with.

    :raise UnsupportedError: this version came without.
    """
    from ..agents.plugin import plugin_path  # noqa: PLC0415

    try:
        return path.read_bytes() == plugin_path().read_bytes()
    except FileNotFoundError:
        return False


def install(root: Path = Path("/"), *, hook: bool = False, unit: bool = False) -> list[Installed]:
    """Copy the plugin to where QEMU may map it, with AppArmor's rule, the hook and the unit.

    :raise FailedError: a file could not be written.
    """
    from ..agents.plugin import plugin_path  # noqa: PLC0415 - the hook needs none of it

    program = " ".join(program_words())
    done = [_write(installed_plugin(root), plugin_path().read_bytes(), 0o644)]
    if (root / APPARMOR_ABSTRACTION).exists():
        done.append(_write(root / APPARMOR_RULE, RULE_TEXT.encode(), 0o644))
    if hook:
        text = HOOK_TEXT.format(program=program, config=CONFIG)
        done.append(_write(root / HOOK, text.encode(), 0o755))
    if unit:
        done.append(_write(root / UNIT, UNIT_TEXT.format(program=program).encode(), 0o644))
    return done


def uninstall(root: Path = Path("/")) -> list[Path]:
    """Remove what :func:`install` wrote. Domains that name the plugin will not start then."""
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
    """How a shell and systemd start this very installation.

    :raise UnsupportedError: its path has characters that they would have to be quoted for.
    """
    import shutil  # noqa: PLC0415

    found = shutil.which("qemu-prefault")
    words = [found] if found else [sys.executable, "-P", "-m", "qemu_prefault"]
    if any(mark in word for word in words for mark in " \t\"'\\$%"):
        raise UnsupportedError(
            f"the path of this installation has a space or a quote in it: {words[0]}",
            "install it elsewhere",
        )
    return words


def _write(path: Path, content: bytes, mode: int) -> Installed:
    try:
        if path.read_bytes() == content:
            return Installed(path, False)
    except OSError:
        pass
    # Beside it, then over it: QEMUs that have the old one mapped keep it.
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        beside.chmod(mode)
        os.replace(beside, path)
    except OSError as error:
        raise _cannot("written", path, error) from error
    return Installed(path, True)


def _cannot(what: str, path: Path, error: OSError) -> FailedError:
    return FailedError(f"{path} could not be {what}: {error.strerror}", "run as root")
