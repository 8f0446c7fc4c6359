# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that installed files name only programs that root alone can change, and are hardened."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_prefault.errors import RefusedError, UnsupportedError
from qemu_prefault.libvirt import connection  # noqa: F401  another user cannot read this file
from qemu_prefault.libvirt import install as install_module
from qemu_prefault.libvirt.install import HOOK_TEXT, check_plugin, install, unit_text
from qemu_prefault.libvirt.trusted_path import check_program, check_trusted

OTHER_USER = 65534
TOOL = [sys.executable, "-m", "qemu_prefault", "libvirt"]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can own the paths")
pytestmark = needs_root


@pytest.fixture
def trusted() -> Iterator[Path]:
    """Return a directory whose components belong to root, unlike those of tmp_path in /tmp."""
    path = Path(f"/run/qemu-prefault-test-{os.getpid()}")
    path.mkdir(mode=0o755)
    yield path
    shutil.rmtree(path)


def make(directory: Path, name: str = "program") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text("#!/bin/sh\nexit 0\n")
    path.chmod(0o755)
    return path


def test_root_s_path_is_trusted(trusted: Path) -> None:
    path = make(trusted / "a" / "b")
    (trusted / "link").symlink_to("a/b")
    (trusted / "absolute").symlink_to(path)
    for each in (path, trusted / "link" / "program", trusted / "absolute", trusted / "a/../a/b"):
        check_trusted(each)
    check_trusted(trusted / "absent" / "file")
    check_trusted(Path("/usr/bin/env"))


@pytest.mark.parametrize("component", ["a", "a/b", "a/b/program"])
@pytest.mark.parametrize(
    "change",
    ["owner", "group", "others", "sticky"],
)
def test_path_that_others_can_change_is_refused(trusted: Path, component: str, change: str) -> None:
    path = make(trusted / "a" / "b")
    changed = trusted / component
    if change == "owner":
        os.chown(changed, OTHER_USER, 0)
    else:
        changed.chmod({"group": 0o775, "others": 0o757, "sticky": 0o1777}[change])
    with pytest.raises(RefusedError) as raised:
        check_trusted(path)
    assert raised.value.code == "untrusted-path"
    assert str(changed) in raised.value.cause and str(changed) in raised.value.remedy


@pytest.mark.parametrize("kind", ["absolute", "relative", "chain", "parent", "loop"])
def test_symbolic_link_into_a_changeable_path_is_refused(trusted: Path, kind: str) -> None:
    theirs = make(trusted / "theirs")
    os.chown(trusted / "theirs", OTHER_USER, OTHER_USER)
    link = trusted / "link"
    if kind == "absolute":
        link.symlink_to(theirs)
    elif kind == "relative":
        link.symlink_to("theirs/program")
    elif kind == "chain":
        (trusted / "second").symlink_to("theirs")
        link.symlink_to("second/program")
    elif kind == "parent":  # normpath() would remove "theirs/.."
        link.symlink_to("theirs/../theirs/program")
    else:
        link.symlink_to("link")
    with pytest.raises(RefusedError):
        check_trusted(link)


def test_link_of_another_user_is_refused(trusted: Path) -> None:
    link = trusted / "link"
    link.symlink_to(make(trusted / "a"))
    os.chown(link, OTHER_USER, OTHER_USER, follow_symlinks=False)
    with pytest.raises(RefusedError):
        check_trusted(link)


def test_interpreter_of_a_script_is_checked(trusted: Path) -> None:
    interpreter = make(trusted / "venv" / "bin", "python")
    script = make(trusted, "qemu-prefault")
    script.write_text(f"#!{interpreter}\n")
    check_program([str(script)])
    os.chown(trusted / "venv", OTHER_USER, 0)
    with pytest.raises(RefusedError, match="venv"):
        check_program([str(script)])


def test_install_refuses_a_program_of_another_user(trusted: Path, tmp_path: Path) -> None:
    """Install with a program in a virtual environment of another user, through the real command."""
    program = make(trusted / "venv" / "bin", "qemu-prefault")
    os.chown(trusted / "venv", OTHER_USER, OTHER_USER)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    for option in ("--hook", "--watch"):
        done = subprocess.run(
            [*TOOL, "install", option, "--root", tmp_path],
            env=environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 5, done.stderr
        assert f"{trusted}/venv belongs to user {OTHER_USER}" in done.stderr
        assert "chown root" in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_enable_refuses_a_plugin_of_another_user(trusted: Path) -> None:
    plugin = make(trusted / "theirs", "plugin.so")
    os.chown(plugin, OTHER_USER, 0)
    done = subprocess.run(
        [*TOOL, "enable", "x", "--plugin", plugin],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert f"{plugin} belongs to user {OTHER_USER}" in done.stderr


def test_session_daemon_may_load_the_user_s_plugin(trusted: Path) -> None:
    plugin = make(trusted / "ours", "plugin.so")
    os.chown(plugin.parent, OTHER_USER, OTHER_USER)
    os.chown(plugin, OTHER_USER, OTHER_USER)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setresuid(OTHER_USER, OTHER_USER, OTHER_USER)
            check_plugin(plugin, "qemu:///session")
            try:
                check_plugin(plugin, "qemu:///system")
            except RefusedError:
                status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


# --- quoting ---

STRANGE = "a b;touch forged;'\"\\%n&|<x>`id`*#"
IN_UNIT = "a b;touch forged;%n&|<x>`id`*#"


def test_hook_quotes_the_program(trusted: Path, tmp_path: Path) -> None:
    program = make(trusted / STRANGE, "qemu-prefault")
    program.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/ran\n')
    script = tmp_path / "hook"
    script.write_text(HOOK_TEXT.format(program=shlex.join([str(program)]), config="/nowhere"))
    script.chmod(0o755)
    argv = [str(script), "a", "started", "begin", "-"]
    subprocess.run(argv, input=b"qemu-prefault", check=True, cwd=tmp_path, timeout=60)
    assert (tmp_path / "ran").read_text() == "libvirt hook a started begin -\n"
    assert not (tmp_path / "forged").exists()


def test_characters_that_systemd_cannot_quote_are_refused(
    trusted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("$x", "a\nb", "\u202e", "'", '"', "\\"):
        program = str(make(trusted / name))
        monkeypatch.setattr(install_module, "program_words", lambda program=program: [program])
        with pytest.raises(UnsupportedError):
            install(tmp_path, unit=True)


@pytest.mark.parametrize("module", ["qemu_prefault", "sitecustomize", "json"])
def test_words_run_no_code_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """Run the command in another user's directory, with this directory in PYTHONPATH."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    package = tmp_path / module
    package.mkdir()
    for name in ("__init__.py", "__main__.py"):
        (package / name).write_text(f"open({str(tmp_path / 'forged')!r}, 'w')\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(
        [*install_module.program_words(), "--version"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert "qemu-prefault" in done.stdout
    assert not (tmp_path / "forged").exists()


needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


@needs_systemd
def test_unit_is_valid_and_quotes_the_program(trusted: Path, tmp_path: Path) -> None:
    program = make(trusted / IN_UNIT, "qemu-prefault")
    unit = tmp_path / "qemu-prefault-watch.service"
    unit.write_text(unit_text([str(program)]))
    verify = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False, timeout=60)
    about = [line for line in done.stderr.splitlines() if unit.name in line]
    assert about == []
    program.unlink()  # systemd now reports the path that it has read
    done = subprocess.run(verify, capture_output=True, text=True, check=False, timeout=60)
    assert f"{program} is not executable" in done.stderr.replace("%%", "%"), done.stderr


@needs_systemd
def test_unit_is_hardened(tmp_path: Path) -> None:
    unit = tmp_path / "qemu-prefault-watch.service"
    unit.write_text(unit_text(["/usr/bin/qemu-prefault"]))
    done = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", "--offline=true", str(unit)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    match = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert match is not None, done.stdout + done.stderr
    assert float(match[1]) <= 3.0, done.stdout


def test_unit_limits_memory_and_tasks() -> None:
    text = unit_text(["/usr/bin/qemu-prefault"])
    assert re.search(r"^MemoryMax=\d+M$", text, re.M) and re.search(r"^TasksMax=\d+$", text, re.M)
    assert "\nProtectHome=yes\n" in text
    assert "\nProtectHome=read-only\n" in unit_text(["/root/venv/bin/qemu-prefault"])


def test_install_does_not_follow_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    hooks = tmp_path / "root/etc/libvirt/hooks/qemu.d"
    hooks.mkdir(parents=True)
    (hooks / ".50-qemu-prefault.new").symlink_to(target)
    (hooks / "50-qemu-prefault").symlink_to(target)
    install(tmp_path / "root", hook=True)
    assert target.read_text() == "precious"
    assert stat.S_ISREG((hooks / "50-qemu-prefault").lstat().st_mode)
