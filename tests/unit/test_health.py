# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the health check of a guest with a simulated console."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.health import UnhealthyGuestError, check_health

LOG = "Linux version 6.12\nSpectre V2 : WARNING: vulnerable\nEXT4-fs (vda): mounted\n"


def shell(state: str = "running", failed: str = "", log: str = LOG) -> Callable[[str], str]:
    def run(command: str) -> str:
        answers = {"is-system-running": state, "--failed": failed, "dmesg": log}
        (answer,) = (text for word, text in answers.items() if word in command)
        return f"{answer}\n"

    return run


def test_healthy_guest_passes() -> None:
    check_health(shell())
    check_health(shell(state="starting\nrunning\r"), dmesg="dmesg --level=err")


@pytest.mark.parametrize("state", ["degraded", "starting", "", "not running"])
def test_other_states_are_unhealthy(state: str) -> None:
    with pytest.raises(UnhealthyGuestError, match="the state of the guest's systemd is"):
        check_health(shell(state=state))


def test_failed_unit_is_unhealthy() -> None:
    with pytest.raises(UnhealthyGuestError) as caught:
        check_health(shell(failed="ssh.service loaded failed failed OpenSSH"))
    assert "ssh.service" in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "------------[ cut here ]------------",
        "BUG: unable to handle page fault",
        "EXT4-fs error (device vda)",
        "INFO: task sh:1 blocked for more than 120 seconds.",
        "Out of memory: Killed process 1",
    ],
)
def test_trouble_in_the_log_is_unhealthy(line: str) -> None:
    with pytest.raises(UnhealthyGuestError, match="kernel log contains an error") as caught:
        check_health(shell(log=f"{LOG}{line}\nmore\n"))
    assert f"{line} / more" in str(caught.value)
