# SPDX-License-Identifier: GPL-2.0-or-later
"""Fuzz domain XML and the hook's configuration."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_prefault.errors import QemuPrefaultError
from qemu_prefault.libvirt import domain_xml
from qemu_prefault.libvirt.hook_config import LifecycleEvent, read
from qemu_prefault.libvirt.prelaunch import boot_ram, check_plain_layout
from qemu_prefault.libvirt.probe import _security_models
from support.fuzz import Target

Check = Callable[[Target], None]

PLUGIN = "/usr/lib/qemu-prefault/qemu-prefault-plugin.so"
DOMAIN = b"""<?xml version="1.0" encoding="UTF-8"?>
<!-- kept: a > b -->
<domain type='kvm'>
  <name>w\xc3\xb6rk</name>
  <uuid>6f1d8f5a-8f0b-4f63-a3a5-0c8d0f5c8d11</uuid>
  <metadata>
    <p:prefault xmlns:p="urn:qemu-prefault:1" restore="now" wait="2.5" populate="all"/>
  </metadata>
  <memory unit='KiB'>4194304</memory>
  <currentMemory unit="GiB">3</currentMemory>
  <memoryBacking><hugepages/></memoryBacking>
  <cpu><numa><cell id='0' memory='1'/></numa></cpu>
  <os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>
  <description>a &lt;b&gt; &amp; "c" <![CDATA[<qemu:arg value='-plugin'/>]]></description>
  <devices>
\t<memory model='dimm'><target><size unit='MiB'>1024</size></target></memory>
  </devices>
</domain>
"""
LOADED = b"""<domain type='kvm' xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>a</name>
  <os><type machine='pc'/></os>
  <memory>1048576</memory>
  <q:commandline>
    <q:arg value='-plugin'/>
    <q:arg value='%s,populate=all'/>
    <q:env name='A' value='b'/>
  </q:commandline>
</domain>
""" % PLUGIN.encode()
EMPTY = b"""<domain type='kvm'><commandline xmlns='http://libvirt.org/schemas/domain/qemu/1.0'/>
<name>x</name><vcpu/></domain>"""
HOST = b"""<capabilities><host><secmodel><model>apparmor</model></secmodel></host></capabilities>"""
CONFIG = b"""\
[default]
restore = "now"
wait = 2.5

[domain.a]
start = "follow"
populate = "resident"
"""


def suppressed() -> contextlib.suppress:
    return contextlib.suppress(QemuPrefaultError)


@pytest.fixture
def file() -> Iterator[Path]:
    """Yield the path of an empty file in memory."""
    fd = os.memfd_create("config")
    yield Path(f"/proc/self/fd/{fd}")
    os.close(fd)


def test_domain_xml(file: Path, check: Check) -> None:
    def parse(xml: bytes) -> None:
        with suppressed():
            about = domain_xml.describe(xml)
            read(about, file).at(LifecycleEvent.RESTORE)
            boot_ram(about.machine, about.memory)
            check_plain_layout(("-m", "1"), about.memory)
        with suppressed():
            domain_xml.loaded(xml)
        with suppressed():
            edited = domain_xml.enable(xml, PLUGIN, ["populate=all"])
            assert domain_xml.loaded(edited.xml) is not None
        domain_xml.disable(xml)

    check(Target("domain-xml", parse, [DOMAIN, LOADED, EMPTY], cost=4))


def test_capabilities_xml(check: Check) -> None:
    check(Target("capabilities-xml", _security_models, [HOST]))


def test_hook_config(file: Path, check: Check) -> None:
    domain = domain_xml.describe(LOADED)

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        config = read(domain, file)
        for event in LifecycleEvent:
            config.at(event)
        assert config.wait > 0

    check(Target("hook-config", parse, [CONFIG], cost=2))
