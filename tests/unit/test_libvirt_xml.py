# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that enabling and disabling the plugin preserves the rest of the XML."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qemu_prefault.errors import InputError, QemuPrefaultError, RefusedError, UnsupportedError
from qemu_prefault.libvirt.domain_xml import (
    OWN_NAMESPACE,
    QEMU_NAMESPACE,
    Loaded,
    describe,
    disable,
    enable,
    loaded,
)
from qemu_prefault.libvirt.install import RULE_TEXT
from support.native import NATIVE

TOOL = [sys.executable, "-m", "qemu_prefault", "libvirt"]
PATH = "/usr/lib/x86_64-linux-gnu/qemu-prefault/qemu-prefault-plugin.so"
VALUE = f"{PATH},socket=~/qemu-prefault.sock"

PLAIN = b"""<?xml version="1.0" encoding="UTF-8"?>
<!-- kept: a > b -->
<domain type='kvm'>
  <name>w\xc3\xb6rk</name>
  <uuid>6f1d8f5a-8f0b-4f63-a3a5-0c8d0f5c8d11</uuid>
  <metadata>
    <libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">
      <libosinfo:os id="http://debian.org/debian/13"/>
    </libosinfo:libosinfo>
    <p:prefault xmlns:p="urn:qemu-prefault:1" restore="now"/>
  </metadata>
  <memory unit='KiB'>4194304</memory>
  <currentMemory unit="GiB">3</currentMemory>
  <os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>
  <description>a &lt;b&gt; &amp; "c" <![CDATA[<qemu:arg value='-plugin'/>]]></description>
  <devices>
\t<memory model='dimm'><target><size unit='MiB'>1024</size></target></memory>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
  </devices>
  <seclabel type='dynamic' model='apparmor' relabel='yes'/>
</domain>
"""
WITH_ARGUMENTS = b"""<domain type='kvm' xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>a</name>
  <q:commandline>
    <q:arg value='-plugin'/>
    <q:arg value='/usr/lib/other.so,x=1'/>
    <q:env name='A' value='b'/>
  </q:commandline>
</domain>"""


def arguments(xml: bytes) -> list[str]:
    """Return QEMU's extra arguments; like libvirt, accept any namespace prefix."""
    tree = ElementTree.fromstring(xml)
    name = f"{{{QEMU_NAMESPACE}}}"
    return [a.attrib["value"] for a in tree.findall(f"{name}commandline/{name}arg")]


def test_add_and_remove_restores_every_byte() -> None:
    for xml in (PLAIN, WITH_ARGUMENTS):
        edited = enable(xml, PATH, ["populate=resident"])
        assert edited.changed
        assert arguments(edited.xml)[-2:] == ["-plugin", f"{PATH},populate=resident"]
        assert disable(edited.xml).xml == xml


def test_only_adds_lines() -> None:
    before, after = PLAIN.splitlines(), enable(PLAIN, PATH).xml.splitlines()
    added = [line for line in after if line not in before]
    assert len(added) == 5, added  # the changed root element, and four new lines
    assert [line for line in before if line not in after] == [b"<domain type='kvm'>"]


def test_adding_twice_is_noop() -> None:
    once = enable(PLAIN, PATH, ["keep=on"])
    twice = enable(once.xml, PATH, ["keep=on"])
    assert (twice.changed, twice.xml) == (False, once.xml)
    assert not disable(PLAIN).changed


def test_options_change_in_place() -> None:
    once = enable(WITH_ARGUMENTS, PATH).xml
    changed = enable(once, PATH, ["populate=all"]).xml
    assert arguments(changed)[2:] == ["-plugin", f"{PATH},populate=all"]
    assert loaded(changed) == Loaded(PATH, ("populate=all",))
    assert disable(changed).xml == WITH_ARGUMENTS


def test_arguments_precede_environment() -> None:
    """Check that arguments precede the environment, as libvirt's schema requires."""
    edited = enable(WITH_ARGUMENTS, PATH).xml
    assert edited.index(PATH.encode()) < edited.index(b"<q:env")
    assert arguments(edited)[:2] == ["-plugin", "/usr/lib/other.so,x=1"]


def test_handwritten_xml_is_recognised() -> None:
    xml = WITH_ARGUMENTS.replace(b"/usr/lib/other.so,x=1", b"file=/opt/qemu-prefault-plugin.so")
    assert loaded(xml) == Loaded("file=/opt/qemu-prefault-plugin.so", ())
    assert arguments(enable(xml, PATH).xml) == ["-plugin", PATH]
    assert arguments(disable(xml).xml) == []


@pytest.mark.parametrize(
    "xml",
    [
        PLAIN.replace(b"<domain type='kvm'>", b"<domain type='kvm' xmlns:qemu='urn:else'>"),
        b"<domain type='kvm' xmlns:qemu='%s'><name>a</name><qemu:commandline/></domain>"
        % QEMU_NAMESPACE.encode(),
        b"<domain type='kvm'><name>a</name><commandline xmlns='%s'><env name='a' value='b'/>"
        b"</commandline></domain>" % QEMU_NAMESPACE.encode(),
        b"<domain type='kvm'></domain>",
        "\ufeff".encode() + PLAIN.split(b"\n", 1)[1],
        PLAIN.replace(b"\n", b"\r\n"),
    ],
    ids=["prefix-taken", "empty-element", "default-namespace", "empty", "bom", "crlf"],
)
def test_unusual_forms(xml: bytes) -> None:
    edited = enable(xml, PATH, ["socket=/a'b"]).xml
    assert arguments(edited)[-2:] == ["-plugin", f"{PATH},socket=/a'b"]
    assert arguments(disable(edited).xml) == []


@pytest.mark.parametrize(
    ("xml", "error", "says"),
    [
        (b"", InputError, "not valid XML"),
        (b"<domain type='kvm'>", InputError, "not valid XML"),
        (b"<network/>", InputError, "<network>"),
        (b"<!DOCTYPE a [<!ENTITY b 'c'>]><domain type='kvm'/>", InputError, "DOCTYPE"),
        (PLAIN.replace(b"'kvm'", b"'qemu'"), UnsupportedError, "KVM"),
        (PLAIN.replace(b"x86_64'", b"aarch64'"), UnsupportedError, "aarch64"),
        (
            WITH_ARGUMENTS.replace(b"value='b'", b"value='/x/qemu-prefault-plugin.so'"),
            RefusedError,
            "LD_PRELOAD",
        ),
    ],
)
def test_refusals_have_reasons(xml: bytes, error: type[QemuPrefaultError], says: str) -> None:
    with pytest.raises(error) as raised:
        enable(xml, PATH)
    assert says in raised.value.cause and raised.value.remedy


def test_describe_domain() -> None:
    found = describe(PLAIN)
    assert (found.name, found.uuid[:8], found.kvm) == ("wörk", "6f1d8f5a", True)
    assert (found.memory, found.current) == (3 << 30, 3 << 30)  # without the DIMM
    assert found.devices == ("dimm",)
    assert found.own == {"restore": "now"}
    assert describe(WITH_ARGUMENTS).own is None
    assert OWN_NAMESPACE.encode() in PLAIN


# --- the command line ---


def run(*arguments: str, xml: bytes = PLAIN) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*TOOL, *arguments], input=xml, capture_output=True, timeout=60, check=False
    )


def test_stdin_to_stdout() -> None:
    enabled = run("enable", "-", "--plugin", PATH)
    assert (enabled.returncode, enabled.stderr) == (0, b"")
    assert arguments(enabled.stdout) == ["-plugin", VALUE]
    again = run("enable", "-", "--plugin", PATH, xml=enabled.stdout)
    assert again.stdout == enabled.stdout
    status = run("status", "-", xml=enabled.stdout)
    assert status.returncode == 0 and PATH.encode() in status.stdout
    disabled = run("disable", "-", xml=enabled.stdout)
    assert (disabled.returncode, disabled.stdout) == (0, PLAIN)
    assert run("status", "-").returncode == 3


def test_refusal_prints_no_xml() -> None:
    """Check that a refusal prints no XML, so that ``virsh define`` gets no input."""
    refused = run("enable", "-", xml=b"<domain type='qemu'/>")
    assert refused.returncode == 4 and refused.stdout == b""
    assert b"KVM" in refused.stderr
    wrong = run("enable", "-", "-o", "popolate=all")
    assert wrong.returncode == 2 and wrong.stdout == b""


def test_install_and_remove(tmp_path: Path) -> None:
    (tmp_path / "etc/apparmor.d/abstractions").mkdir(parents=True)
    (tmp_path / "etc/apparmor.d/abstractions/libvirt-qemu").touch()
    (tmp_path / "usr/lib/x86_64-linux-gnu").mkdir(parents=True)
    first = run("install", "--hook", "--watch", "--root", str(tmp_path))
    assert first.returncode == 0, first.stderr
    plugin = tmp_path / "usr/lib/x86_64-linux-gnu/qemu-prefault/qemu-prefault-plugin.so"
    assert plugin.read_bytes().startswith(b"\x7fELF")
    hook = tmp_path / "etc/libvirt/hooks/qemu.d/50-qemu-prefault"
    assert hook.stat().st_mode & 0o111 == 0o111
    assert subprocess.run(["sh", "-n", str(hook)], check=False).returncode == 0
    again = run("install", "--hook", "--watch", "--root", str(tmp_path))
    assert again.returncode == 0 and b"wrote" not in again.stdout
    removed = run("install", "--remove", "--root", str(tmp_path))
    assert removed.returncode == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [
        tmp_path / "etc/apparmor.d/abstractions/libvirt-qemu"
    ]


def test_apparmor_rule_permits_what_the_plugin_reads() -> None:
    """Check that the rule permits all files that the plugin reads.

    The files in ``elsewhere`` do not need the rule. Either libvirt's own rules permit them, or they
    are links, which AppArmor does not mediate.
    """
    elsewhere = {"/proc/meminfo", "/proc/self/cmdline", "/proc/self/exe", "/proc/%d/exe"}
    elsewhere |= {"/proc/self/ns/cgroup", "/proc/self/fd/%d", "/proc/self/fd/%d/%s"}
    sources = [*NATIVE.glob("plugin/*.c"), *NATIVE.glob("common/*.c")]
    text = "".join(source.read_text() for source in sources)
    # common/limits.c opens these files below a descriptor for /proc.
    text = re.sub(r'"((?:self|sys)/\w[^"]*|loadavg)"', r'"/proc/\1"', text)
    elsewhere.add("/proc/self/ns/user")
    read = set(re.findall(r'"(/(?:proc|sys)/[^"]+)"', text)) - elsewhere
    rules = RULE_TEXT.replace("@{PROC}/@{pid}", "/proc/self").replace("@{PROC}", "/proc")
    permitted = set()
    for rule in re.findall(r"(/\S+) r,", rules):
        head, brace, rest = rule.partition("{")
        permitted |= {head + part for part in rest.rstrip("}").split(",")} if brace else {rule}
    assert len(read) > 10 and "/proc/self/statm" in read
    assert {path for path in read if not {path, f"{path}/"} & permitted} == set()


def test_help_imports_no_libvirt() -> None:
    program = (
        "import sys; sys.argv = ['qemu-prefault', 'libvirt', '--help']\n"
        "from qemu_prefault.cli.main import main\n"
        "try: main()\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    heavy = {"asyncio", "cffi", "libvirt", "xml", "subprocess", "tempfile", "logging", "tomllib"}
    assert heavy & set(done.stderr.split()) == set()
