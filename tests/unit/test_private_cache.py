# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that a cache that another user could change is refused, and nothing in it is run."""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_prefault.errors import InputError
from qemu_prefault_lab import cache, cache_directory

ROOT = Path(__file__).resolve().parents[2]
WITH_ENV = ROOT / "scripts" / "with-env"
ATTACKER = 65534
OWNER = pwd.getpwuid(ATTACKER).pw_name
PRECIOUS = "root's data"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def public() -> Iterator[Path]:
    """Yield a sticky directory to which all users can write, like /tmp."""
    directory = Path(tempfile.mkdtemp(prefix="qemu-prefault-test-", dir="/var/tmp"))
    directory.chmod(0o1777)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QEMU_PREFAULT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def as_attacker(function: Callable[[], None]) -> None:
    """Run a function in a child process that belongs to another user."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(ATTACKER, ATTACKER, ATTACKER)
            os.setresuid(ATTACKER, ATTACKER, ATTACKER)
            function()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def layer_names() -> list[str]:
    """Return the names under which scripts/with-env looks for the tools."""
    code = "import sys; print(sys.version, sys.executable)"
    identity = subprocess.check_output(["/usr/bin/python3", "-c", code])
    found = (ROOT / "tests").glob("requirements*.txt")
    keys = [hashlib.sha256(identity + path.read_bytes()).hexdigest()[:16] for path in found]
    return [f"tools-{key}" for key in keys]


def plant_layers(directory: Path, names: list[str], marker: Path) -> None:
    """Create complete layers whose programs create a file."""
    for name in names:
        layer = directory / name
        (layer / "bin").mkdir(parents=True)
        (layer / "complete").touch()
        for command in ("pip", "python", "python3"):
            program = layer / "bin" / command
            program.write_text(f"#!/bin/sh\ntouch {marker}\nexit 9\n")
            program.chmod(0o755)


def with_env(**variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [WITH_ENV, "", "true"],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


# --- attacks on make ---


@needs_root
def test_foreign_cache_is_not_run(public: Path) -> None:
    planted = public / "cache"
    marker = public / "marker"
    names = layer_names()
    as_attacker(lambda: plant_layers(planted, names, marker))
    done = with_env(QEMU_PREFAULT_CACHE=str(planted))
    assert not marker.exists()
    assert done.returncode == 4
    assert f"belongs to {OWNER}" in done.stderr
    assert "set QEMU_PREFAULT_CACHE" in done.stderr


@needs_root
def test_planted_layer_is_not_run(public: Path) -> None:
    """Plant a layer in a cache to which all users could write for some time."""
    own = public / "cache"
    own.mkdir()
    own.chmod(0o777)
    marker = public / "marker"
    names = layer_names()
    as_attacker(lambda: plant_layers(own, names, marker))
    own.chmod(0o755)
    done = with_env(QEMU_PREFAULT_CACHE=str(own))
    assert not marker.exists()
    assert done.returncode == 4
    assert f"belongs to {OWNER}" in done.stderr
    assert f"rm -r {own}" in done.stderr


@needs_root
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_planted_lock_truncates_nothing(
    public: Path, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    own = public / "cache"
    own.mkdir()
    precious = (tmp_path if link is os.symlink else public) / "precious"
    precious.write_text(PRECIOUS)
    for name in (".lock-tools", ".lock-venv"):
        link(precious, own / name)
    done = with_env(QEMU_PREFAULT_CACHE=str(own))
    assert precious.read_text() == PRECIOUS
    assert done.returncode == 4
    assert ".lock-tools" in done.stderr


@needs_root
@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_root_leaves_the_cache_of_sudo_s_user(public: Path, variable: str) -> None:
    home = public / "home"
    as_attacker(home.mkdir)
    done = subprocess.run(
        [sys.executable, "-I", cache_directory.__file__, "path"],
        env={"HOME": "/root", variable: str(home)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert Path(done.stdout.strip()) == Path(pwd.getpwuid(0).pw_dir) / ".cache" / "qemu-prefault"
    assert f"belongs to {OWNER}" in done.stderr
    assert list(home.iterdir()) == []


# --- attacks on the lab ---


@needs_root
def test_lab_refuses_a_planted_entry(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = public / "cache"
    own.mkdir()
    own.chmod(0o777)
    as_attacker((own / "bin-init-0123").mkdir)
    own.chmod(0o700)
    monkeypatch.setenv("QEMU_PREFAULT_CACHE", str(own))
    with pytest.raises(InputError, match=f"bin-init-0123 in the cache belongs to {OWNER}"):
        cache.entry("bin-init", "0123", lambda path: None)


@needs_root
def test_lab_refuses_a_linked_lock(
    public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = public / "cache"
    (own / "locks").mkdir(parents=True)
    precious = tmp_path / "precious"
    precious.write_text(PRECIOUS)
    (own / "locks" / "image").symlink_to(precious)
    monkeypatch.setenv("QEMU_PREFAULT_CACHE", str(own))
    with pytest.raises(InputError, match="is a symbolic link"):
        cache.entry("image", "0123", lambda path: None)
    assert precious.read_text() == PRECIOUS


@needs_root
@pytest.mark.parametrize("name", ["locks", "scratch", "ccache"])
def test_lab_refuses_a_planted_directory(
    public: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = public / "cache"
    own.mkdir()
    own.chmod(0o777)
    as_attacker((own / name).mkdir)
    own.chmod(0o700)
    monkeypatch.setenv("QEMU_PREFAULT_CACHE", str(own))
    with pytest.raises(InputError, match=f"belongs to {OWNER}"):
        cache.subdirectory(name)


# --- which directories are trusted ---


def refusal(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return why a cache directory is refused, or "" if it is not."""
    monkeypatch.setenv("QEMU_PREFAULT_CACHE", str(path))
    try:
        assert cache.cache_dir() == path.resolve()
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("mode", [0o770, 0o775, 0o777, 0o702, 0o1777, 0o720])
def test_cache_that_others_can_write_is_refused(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "cache"
    own.mkdir()
    own.chmod(mode)
    assert "other users can write to it" in refusal(own, monkeypatch)
    own.chmod(0o755)
    assert refusal(own, monkeypatch) == ""


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_each_parent_is_checked(
    depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "a" / "b" / "c" / "cache"
    own.mkdir(parents=True, mode=0o700)
    parent = own.parents[depth]
    parent.chmod(0o777)
    assert f"because {parent} has mode 0777" in refusal(own, monkeypatch)
    parent.chmod(0o1777)
    assert refusal(own, monkeypatch) == ""


@needs_root
@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_parent_of_another_user_is_refused(
    mode: int, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = public / "theirs"
    as_attacker(theirs.mkdir)
    theirs.chmod(mode)
    own = theirs / "cache"
    own.mkdir(mode=0o700)
    assert f"because {theirs} belongs to {OWNER}" in refusal(own, monkeypatch)


@needs_root
def test_link_into_or_of_another_user_is_refused(
    public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, own = public / "theirs", public / "own"
    as_attacker(theirs.mkdir)
    own.mkdir(mode=0o700)
    (public / "to-theirs").symlink_to(theirs)
    as_attacker(lambda: (public / "to-own").symlink_to("own"))
    (public / "relative").symlink_to("./own/../own")
    assert f"belongs to {OWNER}" in refusal(public / "to-theirs", monkeypatch)
    assert f"belongs to {OWNER}" in refusal(public / "to-own", monkeypatch)
    assert refusal(public / "relative", monkeypatch) == ""


def test_new_directories_are_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0)
    try:
        assert refusal(tmp_path / "a" / "cache", monkeypatch) == ""
        built = cache.entry("image", "1", lambda path: (path / "file").touch())
        made = [tmp_path / "a", tmp_path / "a" / "cache", cache.subdirectory("scratch", "x")]
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in made} == {"0o700"}
    assert not built.stat().st_mode & 0o022
    assert cache.entry("image", "1", lambda path: pytest.fail("built twice")) == built


def test_cache_is_found_without_packages(tmp_path: Path) -> None:
    """Run the program as scripts/with-env does, before the lab is installed."""
    program = cache_directory.__file__
    environment = {"PATH": os.environ["PATH"], "QEMU_PREFAULT_CACHE": str(tmp_path / "cache")}

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-I", program, *arguments],
            env=environment, stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout.strip()

    own = tmp_path / "cache"
    assert run("path") == (0, str(own))
    assert run("lock", ".lock-tools") == (0, str(own / ".lock-tools"))
    assert run("layer", "tools-1") == (1, "")
    (own / "tools-1").mkdir(mode=0o755)
    (own / "tools-1" / "complete").touch(mode=0o644)
    assert run("layer", "tools-1") == (0, "")
    own.chmod(0o777)
    assert run("layer", "tools-1") == (4, "")
