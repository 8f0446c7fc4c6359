# SPDX-License-Identifier: GPL-2.0-or-later
"""Test how the tool interprets KVM's results, with a simulated KVM."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from qemu_prefault import _native
from qemu_prefault.engine.probe import paging_finding
from qemu_prefault.host import kvm
from qemu_prefault.host.kvm import KVM_CAP_PRE_FAULT_MEMORY, Paging, paging, pre_fault_capability

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


INTEL = {"ept": "Y", "eptad": "Y", "pml": "Y"}


@pytest.fixture
def set_parameters(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that simulates the parameters of one KVM module."""

    def replace(module: str, values: dict[str, str]) -> None:
        monkeypatch.setattr(
            kvm, "parameter", lambda asked, name: values.get(name) if asked == module else None
        )

    return replace


@pytest.mark.parametrize(
    ("module", "values", "result"),
    [
        ("kvm_amd", {"npt": "Y"}, Paging("NPT")),
        ("kvm_amd", {"npt": "1"}, Paging("NPT")),
        ("kvm_amd", {"npt": "N"}, Paging("shadow")),
        ("kvm_intel", INTEL, Paging("EPT", ad_bits=True, pml=True)),
        ("kvm_intel", INTEL | {"pml": "N"}, Paging("EPT", ad_bits=True, pml=False)),
        ("kvm_intel", INTEL | {"eptad": "N", "pml": "N"}, Paging("EPT", False, False)),
        # kvm_intel also clears these parameters if ept=0.
        ("kvm_intel", {"ept": "N", "eptad": "N", "pml": "N"}, Paging("shadow")),
        ("kvm", {}, None),
    ],
)
def test_paging(
    set_parameters: Callable[..., None], module: str, values: dict[str, str], result: Paging | None
) -> None:
    set_parameters(module, values)
    assert paging() == result


@pytest.mark.parametrize(
    ("values", "verdict", "words"),
    [
        (INTEL, "ok", "uses PML"),
        (INTEL | {"pml": "N"}, "ok", "PML is off"),
        (INTEL | {"eptad": "N", "pml": "N"}, "note", "without accessed/dirty bits"),
    ],
)
def test_probe_reports_features_of_ept(
    set_parameters: Callable[..., None], values: dict[str, str], verdict: str, words: str
) -> None:
    set_parameters("kvm_intel", values)
    finding = paging_finding()
    assert finding is not None
    assert (finding.check, finding.verdict) == ("paging", verdict)
    assert words in finding.text
    assert bool(finding.remedy) is (verdict == "note")


def test_probe_reports_npt(set_parameters: Callable[..., None]) -> None:
    set_parameters("kvm_amd", {"npt": "Y"})
    finding = paging_finding()
    assert finding is not None
    assert finding.text.startswith("NPT")


@pytest.mark.parametrize(("module", "name"), [("kvm_amd", "npt"), ("kvm_intel", "ept")])
def test_probe_reports_shadow_paging_once(
    set_parameters: Callable[..., None], module: str, name: str
) -> None:
    set_parameters(module, {name: "N"})
    assert paging_finding() is None
