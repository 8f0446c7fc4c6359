# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the hook never blocks a guest and reads its configuration correctly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qemu_prefault.errors import InputError, RefusedError, UnsupportedError
from qemu_prefault.host.procfs import parse_maps
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
    maps = parse_maps(
        line(GIB, 2 * GIB, "rw-p")
        + line(3 * GIB, 4 * GIB, "r--p")
        + line(5 * GIB, 5 * GIB + MIB, "rw-p")
    )
    assert ram_mapping(maps, GIB).start == GIB
    for none_or_several in (2 * GIB, MIB * 2):
        with pytest.raises(RefusedError):
            ram_mapping(maps, none_or_several)
    with pytest.raises(RefusedError):
        ram_mapping((*maps, *maps), GIB)
