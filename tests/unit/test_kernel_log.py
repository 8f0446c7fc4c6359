# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the search in the kernel log for the reason why a process was killed."""

from __future__ import annotations

import pytest

from qemu_prefault.host.kernel_log import find_cause, read_log

OOM = "Memory cgroup out of memory: Killed process 157 (qemu-system-x86) total-vm:1865268kB"
SEGFAULT = "CPU 0/KVM[157]: segfault at 0 ip 0000000000000000 sp 00007f error 14 in qemu"
SECCOMP = (
    'audit: type=1326 audit(1.0:8): auid=1 uid=0 gid=0 ses=1 pid=157 comm="qemu" exe="/q" '
    "sig=31 arch=c000003e syscall=310 compat=0 ip=0x7f code=0x80000000"
)
LOGGED = SECCOMP.replace("sig=31", "sig=0")


def record(text: str, seconds: float = 50.0) -> str:
    return f"3,4711,{int(seconds * 1e6)},-;{text}\n SUBSYSTEM=x\n"


@pytest.mark.parametrize("text", [OOM, SEGFAULT, SECCOMP])
def test_cause_is_found(text: str) -> None:
    records = [record("usb 1-1: new device"), record(text), record(LOGGED), record("later")]
    assert find_cause(records, 157, 40) == text
    assert find_cause(records, 15, 40) is None
    assert find_cause(records, 1570, 40) is None
    assert find_cause(records, 157, 51) is None  # before this process started


@pytest.mark.parametrize(
    "text", ["", "no semicolon", "3,1;short", "3,1,x,-;Killed process 157 (q)"]
)
def test_malformed_records_are_ignored(text: str) -> None:
    assert find_cause([text, record(LOGGED)], 157, 0) is None


def test_read_log() -> None:
    assert all(";" in text for text in read_log())
