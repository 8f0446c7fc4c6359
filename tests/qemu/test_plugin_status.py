# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the plugin's status and messages state what the plugin does."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from qemu_prefault.agents.plugin import plugin_path
from qemu_prefault_lab.wait import wait_for
from support.native import build_capable_plugin
from support.plugin import ask_status, wait_started
from support.qemu import Qemu, StartQemu, kvm_usable
from support.qmp import QmpClient

pytestmark = pytest.mark.skipif(not kvm_usable(), reason="/dev/kvm cannot be opened")


def stderr_of(qemu: Qemu) -> str:
    """Let QEMU exit, and return what it has printed to stderr."""
    qemu.process.terminate()
    return qemu.process.communicate(timeout=60)[1].decode()


@pytest.fixture(scope="module")
def capable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_capable_plugin(tmp_path_factory.mktemp("plugin") / "qemu-prefault-plugin.so")


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        (("vcpu=borrow", "start=background"), ["start"]),
        (("vcpu=borrow", "rate=1K"), ["rate"]),
        (("vcpu=borrow", "start=background", "rate=1K"), ["start", "rate"]),
        (("vcpu=borrow",), []),
        (("vcpu=auto", "start=background", "rate=1M"), []),
    ],
)
def test_option_without_effect_is_reported(
    start_qemu: StartQemu,
    tmp_path: Path,
    capable: Path,
    options: tuple[str, ...],
    ignored: list[str],
) -> None:
    control = tmp_path / "control"
    plugin = ",".join([str(capable), f"socket={control}", *options])
    qemu = start_qemu("-m", "64M", "-plugin", plugin, accel="kvm", paused=False)
    assert wait_started(qemu, control)["ignored_options"] == ignored
    printed = stderr_of(qemu)
    assert ("no effect" in printed) == bool(ignored)
    for name in ignored:
        assert f"{name}=" in printed


@pytest.mark.parametrize("first", ["preload", "plugin"])
@pytest.mark.parametrize("option", ["socket=/late", "socket=off", "vcpu=borrow"])
def test_late_option_without_effect_is_reported(
    start_qemu: StartQemu, tmp_path: Path, first: str, option: str
) -> None:
    control, file = tmp_path / "control", plugin_path()
    if first == "preload":
        prefix = ["env", f"LD_PRELOAD={file}", f"QEMU_PREFAULT_OPTIONS=socket={control}"]
        early: list[str] = []
    else:
        other = tmp_path / "qemu-prefault-plugin.so"
        other.symlink_to(file)  # QEMU combines the options of equal paths
        prefix, early = [], ["-plugin", f"{other},socket={control}"]
    late = ["-plugin", f"{file},{option},hold=2"]
    qemu = start_qemu("-m", "64M", *early, *late, accel="kvm", prefix=prefix)
    QmpClient(qemu.qmp).close()
    assert ask_status(control)["plugin"] == 1
    printed = stderr_of(qemu)
    assert f"{option}, and the option no longer has an effect" in printed
    assert "hold" not in printed


def test_machine_without_vcpus_is_reported(
    start_qemu: StartQemu, tmp_path: Path, capable: Path
) -> None:
    control = tmp_path / "control"
    qemu = start_qemu("-M", "none", "-plugin", f"{capable},socket={control}", accel="kvm")
    QmpClient(qemu.qmp).close()
    assert ask_status(control)["no_prefault_vcpus"] == "the machine has no vCPU"


def set_capability(monitor: QmpClient, enabled: bool) -> None:
    capability = {"capability": "background-snapshot", "state": enabled}
    try:
        monitor.execute("migrate-set-capabilities", capabilities=[capability])
    except Exception as error:
        pytest.skip(f"this QEMU cannot take background snapshots: {error}")


def test_closed_userfaultfd_does_not_hold_the_plugin(start_qemu: StartQemu, tmp_path: Path) -> None:
    """Check that QEMU's test for background snapshots does not disable the plugin."""
    control = tmp_path / "control"
    qemu = start_qemu(
        "-m", "64M", "-plugin", f"{plugin_path()},socket={control},log=on", accel="kvm"
    )
    set_capability(QmpClient(qemu.qmp), True)
    wait_for(lambda: ask_status(control)["held"] is None, "the plugin continues")
    assert '"event":"held"' in stderr_of(qemu)  # QEMU has registered memory


def test_background_snapshot_holds_the_plugin(start_qemu: StartQemu, tmp_path: Path) -> None:
    control, target = tmp_path / "control", tmp_path / "target"
    with socket.socket(socket.AF_UNIX) as reader:
        reader.bind(str(target))
        reader.listen()
        qemu = start_qemu(
            *("-m", "64M", "-plugin", f"{plugin_path()},socket={control}"),
            accel="kvm",
            paused=False,
        )
        monitor = QmpClient(qemu.qmp)
        set_capability(monitor, True)
        monitor.execute("migrate-set-parameters", **{"max-bandwidth": 4096})
        monitor.execute("migrate", uri=f"unix:{target}")
        wait_for(lambda: ask_status(control)["held"] == "background snapshot", "held")
