# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the command lines of the lab's guests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_prefault_lab.guest import Guest, GuestConfig, defaults
from qemu_prefault_lab.system import SystemConfig

DIRECTORY = Path("/scratch")


@pytest.fixture
def default_plugin() -> Iterator[None]:
    before = defaults.plugin
    defaults.plugin = ["keep=off"]
    yield
    defaults.plugin = before


def started(monkeypatch: pytest.MonkeyPatch, config: GuestConfig | None, **changes: object) -> str:
    """Return the command line of a Guest, without starting QEMU."""

    def stop(_: Guest, argv: list[str]) -> None:
        raise RuntimeError(" ".join(argv))

    monkeypatch.setattr(Guest, "_start", stop)
    with pytest.raises(RuntimeError) as caught:
        Guest(config, **changes)
    return str(caught.value)


def test_backing_is_machine_memory() -> None:
    argv = " ".join(GuestConfig(machine="q35", backing="file,prealloc=on").argv(DIRECTORY))
    assert "memory-backend-file,share=on,mem-path=/scratch/memory,id=ram,size=384M,prealloc=on" in (
        argv
    )
    assert "-machine q35,memory-backend=ram" in argv
    assert "memory-backend" not in " ".join(GuestConfig(backing=None).argv(DIRECTORY))


def test_plugin_arguments() -> None:
    assert "prefault" not in " ".join(GuestConfig().argv(DIRECTORY))
    argv = GuestConfig(plugin=["keep=off"]).argv(DIRECTORY)
    assert argv[argv.index("-plugin") + 1].endswith(".so,socket=/scratch/control,keep=off")
    argv = GuestConfig(plugin=[], preload=True, wrapper=["nice"]).argv(DIRECTORY)
    assert argv[:2] == ["nice", "env"]
    assert argv[2].startswith("LD_PRELOAD=/")
    assert argv[3] == "QEMU_PREFAULT_OPTIONS=socket=/scratch/control"
    assert "-plugin" not in argv


@pytest.mark.usefixtures("default_plugin")
def test_default_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    assert started(monkeypatch, None).count("keep=off") == 1
    assert "keep=off" not in started(monkeypatch, None, plugin=[])


def test_changes_override_config(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GuestConfig(machine="microvm", memory_mib=128)
    argv = started(monkeypatch, config, memory_mib=256, paused=True, args=["-last"])
    assert "-machine microvm," in argv
    assert "-m 256M" in argv
    assert argv.endswith(" -S -last")
    with pytest.raises(TypeError, match="nonsense"):
        Guest(config, nonsense=1)


def test_incoming_file_is_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    assert started(monkeypatch, None, incoming=Path("/state")).endswith(" -incoming defer")
    assert started(monkeypatch, None, incoming="tcp:[::]:1").endswith(" -incoming tcp:[::]:1")


@pytest.mark.parametrize("machine, kernel", [("microvm", "vmlinux"), ("pc", "vmlinuz")])
def test_distribution_kernel_suits_machine(machine: str, kernel: str) -> None:
    config = SystemConfig(distro="sid", overlay=Path("/overlay"), machine=machine)
    argv = config.argv(DIRECTORY)
    assert argv[argv.index("-kernel") + 1].endswith(f"/sid/boot/{kernel}")
    config = SystemConfig(distro=None, overlay=Path("/overlay"), machine=machine)
    assert "-kernel" not in config.argv(DIRECTORY)
