# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that QEMU survives random interference while the plugin prefaults.

At the end of each guest's run, all memory must be prefaulted. ``--boots`` sets the number of
guests. The default is 6, and ``make test-full`` uses 100. ``--seed`` repeats the random choices of
an earlier run of the test.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_prefault_lab.guest import Guest
from support.guest import check_memory, mapped_bytes, plug_dimm

pytestmark = pytest.mark.campaign

MIB = 1 << 20
KVM_RAM = re.compile(
    r"^  ([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (?:ram|rom)\): .* KVM\b", re.M
)
# The host bridge's PAM register for 0xf0000: its CONFIG_ADDRESS, and the I/O port for its data.
PAM0 = {"pc": ("0x80000058", "0xcfd"), "q35": ("0x80000090", "0xcfc")}
RESET_VECTOR = "0xea"  # a far jump


class Campaign:
    """A guest, and actions that may interfere with prefaulting at any time."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.machine = rng.choice(["pc", "q35", "microvm"])
        self.options = rng.choice([[], [], ["quirk=keep"], ["hold=0"], ["populate=all"]])
        self.done: list[str] = []
        self.dimms = 0
        self.ready = False
        self.smp = rng.choice([1, 1, 2])
        self.guest = Guest(
            machine=self.machine,
            smp=self.smp,
            memory_mib=192,
            memory="" if self.machine == "microvm" else "slots=4,maxmem=1G",
            workload_mib=32,
            paused=rng.random() < 0.5,
            plugin=self.options,
            args=["-action", "reboot=reset"],
        )

    def __str__(self) -> str:
        options = ",".join(self.options) or "no options"
        return f"{self.machine}, {self.smp} vCPU, {options}: {' '.join(self.done)}"

    def reset(self) -> None:
        self.guest.reset()
        if self.machine in PAM0 and RESET_VECTOR not in self.guest.hmp("xp /1xb 0xffff0"):
            self.done.append("(before QEMU had copied SeaBIOS)")
            self.turn_pam_off()
            self.guest.reset()
        self.ready = False

    def turn_pam_off(self) -> None:
        """Make the chipset map SeaBIOS's ROM again, because a reset does not reset PAM.

        Otherwise the guest would execute zeros in RAM to which SeaBIOS has not copied itself yet
        (docs/design/plugin.md, "Firmware").
        """
        address, port = PAM0[self.machine]
        self.guest.qmp("stop")
        self.guest.hmp(f"o /w 0xcf8 {address}")
        self.guest.hmp(f"o /b {port} 0")
        assert RESET_VECTOR in self.guest.hmp("xp /1xb 0xffff0")
        self.guest.qmp("cont")

    def plug(self) -> None:
        if self.machine == "microvm" or self.dimms == 4:
            self.stop_and_go_on()
            return
        name = f"d{self.dimms}"
        self.dimms += 1
        plug_dimm(self.guest, 32 * MIB, name)

    def stop_and_go_on(self) -> None:
        self.guest.qmp("stop")
        self.wait_a_moment()
        self.guest.qmp("cont")

    def populate_by_qom(self) -> None:
        self.guest.qmp("qom-set", path="/objects/ram", property="prealloc", value=True)

    def prefault_again(self) -> None:
        self.guest.control("prefault")

    def pause_and_resume(self) -> None:
        self.guest.control("pause")
        self.wait_a_moment()
        self.guest.control("resume")

    def drop_a_monitor(self) -> None:
        # Disconnect only after QEMU has read all input. Otherwise QEMU occasionally crashes, with
        # or without the plugin (docs/design/killed-at-any-instant.md, "A client that disappears").
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(self.guest.qmp_path))
            client.sendall(b'{"execute": "qmp_capabilities"}{"execute": "query-commands"}\n')
            received = b""
            while b'"name": ' not in received:  # until the last, long reply begins
                received += client.recv(1024)

    def drop_a_client(self) -> None:
        line = self.rng.choice(["status\n", "follow\n", "work 4 65536\n0 0 40", "sta", ""])
        send_and_disconnect(str(self.guest.control_path), line)

    def become_ready(self) -> None:
        if not self.ready:
            self.guest.wait_ready()
            self.ready = True

    def wait_a_moment(self) -> None:
        """Sleep for a random duration of up to half a second."""
        time.sleep(self.rng.uniform(0, 0.5))

    def run(self) -> None:
        self.guest.qmp("cont")
        actions: list[Callable[[], None]] = [
            self.reset, self.plug, self.stop_and_go_on, self.populate_by_qom, self.prefault_again,
            self.pause_and_resume, self.drop_a_monitor, self.drop_a_client, self.become_ready,
        ]  # fmt: skip
        for action in self.rng.choices(actions, k=8):
            self.done.append(action.__name__)
            action()
            self.wait_a_moment()

    def check(self) -> None:
        self.become_ready()
        check_memory(self.guest)
        status = self.guest.wait_kept()
        slots = [slot for slot in status["slots"] if slot["as"] == 0]
        assert {(slot["gpa"], slot["size"]) for slot in slots} == kvm_ranges(self.guest)
        kept = [slot for slot in slots if not slot["resident_only"]]
        assert sum(slot["size"] for slot in kept) >= (190 + 32 * self.dimms) * MIB
        assert {slot["state"] for slot in kept} == {"done"}
        assert status["counters"]["errors"] == 0
        mapped = mapped_bytes(self.guest)
        wanted = sum(slot["size"] for slot in kept)
        now = self.guest.control("status")
        assert mapped >= wanted, (mapped - wanted, host_events(), status, now)
        check_memory(self.guest)
        self.guest.qmp("quit")
        assert self.guest.wait_exit(30) == 0


def send_and_disconnect(path: str, text: str) -> None:
    """Connect, send a text, and disconnect without reading a reply."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(path)
        client.sendall(text.encode())


def thread_states(pid: int) -> str:
    """Return each thread's system call and kernel stack, to diagnose a hang."""
    lines = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        facts = [(task / name).read_text().strip() for name in ("comm", "syscall", "stack")]
        lines.append("\n    ".join([f"{task.name} {facts[0]}", *"\n".join(facts[1:]).split("\n")]))
    return "\n".join(lines)


def host_events() -> str:
    """Return the counters of host events that also drop stage-2 table entries.

    Examples are page migration and compaction.
    """
    wanted = re.compile(r"^(pgmigrate|compact|pswp|thp)", re.M)
    lines = Path("/proc/vmstat").read_text().splitlines()
    return "; ".join(line for line in lines if wanted.match(line) and not line.endswith(" 0"))


def kvm_ranges(guest: Guest) -> set[tuple[int, int]]:
    """Return the memslots' ranges, as QEMU reports them."""
    views = guest.hmp("info mtree -f").replace("\r", "").split("FlatView")
    memory = next(view for view in views if 'AS "memory"' in view)
    return {
        (int(first, 16), int(last, 16) + 1 - int(first, 16))
        for first, last in KVM_RAM.findall(memory)
    }


def test_random_interference(request: pytest.FixtureRequest, seed: int) -> None:
    boots: int = request.config.getoption("boots")
    rng = random.Random(seed)
    for number in range(boots):
        campaign = Campaign(rng)
        with campaign.guest:
            try:
                campaign.run()
                campaign.check()
            except Exception as error:
                error.add_note(f"boot {number}, --seed {seed}: {campaign}")
                with contextlib.suppress(FileNotFoundError):
                    error.add_note(thread_states(campaign.guest.pid))
                status = campaign.guest.process.poll()
                error.add_note(f"QEMU's status: {status}, stderr: {campaign.guest.stderr}")
                error.add_note(f"serial: {campaign.guest.serial_log[-1000:]!r}")
                raise
        print(f"{number}: {campaign}")
