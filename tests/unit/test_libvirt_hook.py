# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the hook never blocks a guest and reads its configuration correctly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_prefault.errors import InputError, RefusedError, UnsupportedError
from qemu_prefault.host.mappings import parse_maps
from qemu_prefault.libvirt import hook as hook_module
from qemu_prefault.libvirt.domain_xml import Domain, describe, enable
from qemu_prefault.libvirt.hook_config import HookConfig, LifecycleEvent, When, read
from qemu_prefault.libvirt.install import HOOK_TEXT
from qemu_prefault.libvirt.prelaunch import boot_ram, ram_mapping

HOOK = [sys.executable, "-m", "qemu_prefault", "libvirt", "hook"]
XML = b"""<domain type='kvm'>
  <name>a</name>
  <uuid>6f1d8f5a-8f0b-4f63-a3a5-0c8d0f5c8d11</uuid>
  %s
  <memory>1048576</memory>
  <os><type arch='x86_64' machine='pc-i440fx-10.0'>hvm</type></os>
</domain>
"""
NOW = XML % b"<metadata><p:x xmlns:p='urn:qemu-prefault:1' restore='now' wait='2'/></metadata>"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def hook(*arguments: str, xml: bytes = XML % b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*HOOK, *arguments], input=xml, capture_output=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    "xml", [b"", b"<domain", b"\xff\xfe", b"<network/>", NOW, b"x" * (17 << 20)]
)
@pytest.mark.parametrize(
    "operation",
    [
        ("started", "begin", "-"),
        ("restore", "begin", "-"),
        ("release", "end", "-", "destroyed"),
        ("reconnect", "begin", "-"),
        ("no-such-operation", "begin", "-"),
    ],
    ids=lambda operation: operation[0],
)
def test_succeeds_without_output(operation: tuple[str, ...], xml: bytes) -> None:
    done = hook("no-such-domain", *operation, xml=xml)
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"Traceback" not in done.stderr


def test_no_arguments_or_stdin() -> None:
    assert hook().returncode == 0
    closed = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *HOOK, "a", "started", "begin", "-"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (closed.returncode, closed.stdout) == (0, b"")


def test_errors_are_logged() -> None:
    asked = NOW.replace(b"wait='2'", b"start='follow'")
    done = hook("a", "started", "begin", "-", xml=asked)
    assert b"was not found" in done.stderr
    typo = NOW.replace(b"restore=", b"restor=")
    assert b"unknown key 'restor'" in hook("a", "started", "begin", "-", xml=typo).stderr


def test_absent_plugin_does_not_block_migration(tmp_path: Path) -> None:
    plain = XML % b""
    for operation in ("migrate", "restore"):
        missing = enable(plain, "/nowhere/qemu-prefault-plugin.so").xml
        assert hook("a", operation, "begin", "-", xml=missing).stdout == plain
        here = tmp_path / "qemu-prefault-plugin.so"
        here.touch()
        there = enable(plain, str(here)).xml
        assert hook("a", operation, "begin", "-", xml=there).stdout == b""


@pytest.mark.parametrize("program", ["false", "/nowhere", "sh -c 'kill -9 $$' ", "exit 3;"])
def test_script_succeeds_if_the_program_fails(tmp_path: Path, program: str) -> None:
    script = tmp_path / "hook"
    script.write_text(HOOK_TEXT.format(program=program, config="/nowhere"))
    script.chmod(0o755)
    for xml in (NOW, b"", XML):
        argv = [str(script), "a", "started", "begin", "-"]
        done = subprocess.run(argv, input=xml, check=False, timeout=60)
        assert done.returncode == 0


def test_script_starts_python_only_if_needed(tmp_path: Path) -> None:
    script, config, trace = tmp_path / "hook", tmp_path / "config", tmp_path / "trace"
    script.write_text(HOOK_TEXT.format(program=f"tee -a {trace} --", config=config))
    script.chmod(0o755)

    def heard(xml: bytes, *arguments: str) -> bytes:
        trace.write_bytes(b"")
        subprocess.run([script, "a", *arguments], input=xml, check=True, cwd=tmp_path, timeout=60)
        return trace.read_bytes()

    assert heard(NOW, "started", "begin", "-").strip() == NOW.strip()
    assert heard(NOW, "prepare", "begin", "-") == b""
    assert heard(NOW, "reconnect", "begin", "-") == b""
    assert heard(XML, "started", "begin", "-") == b""
    config.touch()
    assert heard(XML, "started", "begin", "-").strip() == XML.strip()


# --- configuration ---


def domain(xml: bytes = XML % b"") -> Domain:
    return describe(xml)


def test_default_is_no_action(tmp_path: Path) -> None:
    assert read(domain(), tmp_path / "none") == HookConfig()
    assert {HookConfig().at(moment) for moment in LifecycleEvent} == {When.OFF}


def test_domain_setting_overrides_file(tmp_path: Path) -> None:
    config = tmp_path / "libvirt.toml"
    config.write_text('[default]\nrestore = "later"\nmigrate = "later"\n[domain.a]\nstart="follow"')
    assert read(domain(), config) == HookConfig(When.FOLLOW, When.LATER, When.LATER)
    assert read(domain(NOW), config) == HookConfig(When.FOLLOW, When.NOW, When.LATER, wait=2.0)


@pytest.mark.parametrize(
    "text",
    ["x", "[defaults]", "[default]\nstart='now'", "[default]\nwait=0", "default=1", "domain=1",
     "[domain]\na=1", "[default]\nwait=3600", "[default]\npopulate='some'"],
)  # fmt: skip
def test_invalid_setting_is_rejected(tmp_path: Path, text: str) -> None:
    config = tmp_path / "libvirt.toml"
    config.write_text(text)
    with pytest.raises(InputError) as raised:
        read(domain(), config)
    assert raised.value.remedy


# --- guests without a monitor ---


@pytest.mark.parametrize(
    ("machine", "memory", "low", "high"),
    [
        ("pc", 512 * MIB, 512 * MIB, 0),
        ("pc-i440fx-10.0", 3584 * MIB - MIB, 3584 * MIB - MIB, 0),
        ("pc-i440fx-10.0", 3584 * MIB, 3 * GIB, 512 * MIB),
        ("pc-i440fx-7.2", 8 * GIB, 3 * GIB, 5 * GIB),
        ("pc-q35-10.0", 2816 * MIB - MIB, 2816 * MIB - MIB, 0),
        ("pc-q35-10.0", 2816 * MIB, 2 * GIB, 768 * MIB),
        ("q35", 8 * GIB, 2 * GIB, 6 * GIB),
    ],
)
def test_ram_of_a_pc(machine: str, memory: int, low: int, high: int) -> None:
    """Check that the ranges are those that ``info mtree -f`` prints."""
    expected = [(0, 640 * KIB, 0), (MIB, low - MIB, MIB)]
    if high:
        expected.append((4 * GIB, high, low))
    assert list(boot_ram(machine, memory)) == expected


@pytest.mark.parametrize("machine", ["microvm", "pseries-10.0", "", "pcx"])
def test_ram_of_other_machines_is_unsupported(machine: str) -> None:
    with pytest.raises(UnsupportedError):
        boot_ram(machine, GIB)


def test_guest_ram_mapping() -> None:
    line = "{:x}-{:x} {} 00000000 00:00 0 \n".format
    text = (
        line(GIB, 2 * GIB, "rw-p")
        + line(3 * GIB, 4 * GIB, "r--p")
        + line(5 * GIB, 5 * GIB + MIB, "rw-p")
    )
    maps = parse_maps(text.encode())
    assert ram_mapping(maps, GIB).start == GIB
    for none_or_several in (2 * GIB, MIB * 2):
        with pytest.raises(RefusedError):
            ram_mapping(maps, none_or_several)
    with pytest.raises(RefusedError):
        ram_mapping((*maps, *maps), GIB)


# --- the directory for marks ---

UUID = "6f1d8f5a-8f0b-4f63-a3a5-0c8d0f5c8d11"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change owners")


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "marks"
    monkeypatch.setattr(hook_module, "MARKS", path)
    return path


def call(capfd: pytest.CaptureFixture[str], *operation: str, uuid: str = UUID) -> str:
    """Call the hook in this process, and return what it logs."""
    reader, writer = os.pipe()
    os.write(writer, NOW.replace(UUID.encode(), uuid.encode()))
    os.close(writer)
    try:
        assert hook_module.main(("a", *operation), reader) == b""
    finally:
        os.close(reader)
    return capfd.readouterr().err


def test_mark_is_private_and_removed(marks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(capfd, "restore", "begin", "-") == ""
    assert marks.stat().st_mode & 0o777 == 0o700
    assert (marks / UUID).read_text() == "restore"
    assert (marks / UUID).stat().st_mode & 0o777 == 0o600
    assert "restore: " in call(capfd, "started", "begin", "-") or not (marks / UUID).exists()
    assert list(marks.iterdir()) == []
    call(capfd, "migrate", "begin", "-")
    call(capfd, "release", "end", "-")
    assert list(marks.iterdir()) == []


def test_directory_of_an_older_version_becomes_private(
    marks: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    marks.mkdir()
    marks.chmod(0o755)
    assert call(capfd, "restore", "begin", "-") == ""
    assert marks.stat().st_mode & 0o777 == 0o700


@needs_root
@pytest.mark.parametrize("kind", ["owner", "writable", "sticky", "link", "file"])
def test_directory_of_another_user_is_not_used(
    marks: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / UUID).symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("precious")
    if kind == "link":
        marks.symlink_to(theirs)
    elif kind == "file":
        marks.write_text("")
    else:
        theirs.rename(marks)
        marks.chmod({"writable": 0o722, "sticky": 0o1777}.get(kind, 0o700))
        os.chown(marks, 65534 if kind == "owner" else 0, 0)
    assert "as a start, because" in call(capfd, "restore", "begin", "-")
    assert (tmp_path / "precious").read_text() == "precious"


def test_mark_is_no_symbolic_link(
    marks: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    marks.mkdir(mode=0o700)
    (marks / UUID).symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("precious")
    assert "symbolic links" in call(capfd, "restore", "begin", "-")
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("uuid", ["", "..", "../x", "-", "٣", "x" * 300])
def test_malformed_uuid_names_no_file(
    marks: Path, capfd: pytest.CaptureFixture[str], uuid: str
) -> None:
    assert "malformed" in call(capfd, "restore", "begin", "-", uuid=uuid)
    assert list(marks.iterdir()) == []
    assert "report this bug" not in call(capfd, "release", "end", "-", uuid=uuid)


def test_hook_ends_if_a_call_takes_too_long(tmp_path: Path) -> None:
    """Let stdin stay open, as if libvirt or a read of /proc never returned."""
    program = (
        "from qemu_prefault.libvirt import hook\nhook.LONGEST_CALL = 1\n"
        "hook.main(('a', 'started', 'begin', '-'))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stderr is not None
    with child:
        assert b"more than 1 s" in child.stderr.read()
        assert child.wait() == 0


def test_closed_stderr_does_not_reach_the_xml(tmp_path: Path) -> None:
    """Check that a message does not replace the XML that libvirt reads from stdout."""
    missing = enable(XML % b"", "/nowhere/qemu-prefault-plugin.so").xml
    done = subprocess.run(
        ["sh", "-c", '"$@" 2>&-', "sh", *HOOK, "a", "migrate", "begin", "-"],
        input=missing, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, XML % b"")
