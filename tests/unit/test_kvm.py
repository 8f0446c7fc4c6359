# SPDX-License-Identifier: GPL-2.0-or-later
"""Test how the tool interprets KVM's results, with a simulated KVM."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from qemu_prefault import _native
from qemu_prefault.host.kvm import KVM_CAP_PRE_FAULT_MEMORY, pre_fault_capability

open_file = os.open


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[int]:
    """Return a list that collects the arguments of KVM_CHECK_EXTENSION.

    The fixture's parameter is the simulated result.
    """
    numbers: list[int] = []

    def check_extension(_fd: int, number: int) -> int:
        numbers.append(number)
        return int(request.param)

    monkeypatch.setattr(os, "open", lambda path, flags: open_file(os.devnull, flags))
    monkeypatch.setattr(_native, "lib", SimpleNamespace(kvm_check_extension=check_extension))
    return numbers


@pytest.mark.parametrize("asked", [1], indirect=True)
def test_answer_one_is_available(asked: list[int]) -> None:
    assert pre_fault_capability().available is True
    assert asked == [KVM_CAP_PRE_FAULT_MEMORY]


@pytest.mark.parametrize("asked", [0], indirect=True)
def test_answer_zero_is_unavailable(asked: list[int]) -> None:
    capability = pre_fault_capability()
    assert capability.available is False
    assert capability.reason and capability.remedy
    assert asked == [KVM_CAP_PRE_FAULT_MEMORY]


def test_permission_error_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, _flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)
    capability = pre_fault_capability()
    assert capability.available is None
    assert "Permission denied" in capability.reason
