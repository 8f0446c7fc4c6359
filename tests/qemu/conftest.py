# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures that start real QEMUs with ``-S`` and kill them at the test's end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from support.qemu import QEMU, Qemu, StartQemu, kvm_usable, launch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests in this directory if QEMU is not installed."""
    if QEMU is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="qemu-system-x86_64 is not installed"))


@pytest.fixture
def start_qemu(tmp_path: Path) -> Iterator[StartQemu]:
    """Return a function that starts a QEMU and waits for its QMP socket.

    For example: ``start_qemu("-m", "256M", accel="tcg")``.
    """
    running: list[Qemu] = []

    def start(
        *arguments: str, accel: str = "tcg", paused: bool = True, prefix: Sequence[str] = ()
    ) -> Qemu:
        if accel == "kvm" and not kvm_usable():
            pytest.skip("/dev/kvm is not usable")
        qemu = launch(tmp_path, len(running), arguments, accel, paused, prefix=prefix)
        running.append(qemu)
        return qemu

    yield start
    for qemu in running:
        qemu.process.kill()
        qemu.process.communicate()


@pytest.fixture(params=["tcg", "kvm"])
def accel(request: pytest.FixtureRequest) -> str:
    """Return ``tcg`` or ``kvm``, or skip the test if KVM is not usable."""
    if request.param == "kvm" and not kvm_usable():
        pytest.skip("/dev/kvm is not usable")
    return str(request.param)
