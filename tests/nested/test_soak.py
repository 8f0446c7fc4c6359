# SPDX-License-Identifier: GPL-2.0-or-later
"""Test random runs of the tool on random guests, each beside a neighbour.

Each iteration chooses a machine, a source of memory, limits, seccomp filters, an allocator, a
scheduling policy for the vCPUs and an action at random. Both guests must keep running and keep
their memory. The neighbour uses the same source and the same scheduling policy, and must still be
able to allocate all of its memory.

``--minutes`` limits the time. ``--seed N --iteration I`` repeats one iteration. Each iteration
prints a line of JSON. ``--ledger FILE`` also writes these lines to a file. If the file exists, the
run skips the iterations that the file lists. The file can also be the saved output of an earlier
run. On a host whose KVM lacks the ioctl, the tool only populates.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar, Unpack

import pytest

from qemu_prefault.errors import Code, ExitStatus
from qemu_prefault.host import kvm
from qemu_prefault_lab.guest import Guest
from qemu_prefault_lab.wait import wait_for
from support import under_filter
from support.guest import GuestOptions, check_memory, start_tool
from support.ledger import Entry, Ledger
from support.limits import (
    MIB,
    cgroups,
    group_root,
    huge_pages,
    in_group,
    mounted,
    out_of_memory_kills,
)
from support.plugin import capable_prefix
from support.process import wait_clean
from support.scheduling import (
    POLICIES,
    limit_cpu,
    remove_cpu_limits,
    set_policy,
    vcpu_threads,
)
from support.tool import Result, Tool

pytestmark = pytest.mark.soak

RAM = 160  # MiB of each guest
WORKLOAD = 16
PROMISED = 80  # MiB that the neighbour allocates at the end; its kernel uses another 60 MiB
SHORT = 40  # MiB by which a tight file system is too small for both guests
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
FILTERS = {
    "none": [],
    "debuggers' calls": ["kill", "310", "311", "101"],
    "optional call": ["kill", "62"],
    "optional calls, trapped": ["trap", "62", "222", "223", "226"],
    "needed call": ["kill", "35"],
    "needed call, denied": ["errno", "35"],
    "two that allow": ["log,allow", "9", "28", "35"],
}
ALLOCATORS = {
    "jemalloc": "libjemalloc.so.[0-9]",
    "tcmalloc": "libtcmalloc_minimal.so.[0-9]",
    "mimalloc": "libmimalloc.so.[0-9]",
}
LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")
#: The errors with which a run may end, and their exit statuses (docs/reference/errors.md).
EXPECTED_ERRORS = {
    Code.RESUMED: ExitStatus.FAILED,
    Code.SECCOMP: ExitStatus.UNSUPPORTED,
    Code.BUSY_AGENT: ExitStatus.REFUSED,
    Code.MONITOR_BUSY: ExitStatus.REFUSED,
    Code.NO_MEMORY: ExitStatus.REFUSED,
    Code.NO_TASKS: ExitStatus.REFUSED,
}
#: The policies with which vCPUs may keep QEMU's main thread from L1's only CPU, for example while
#: the guest boots. A run may then end because QEMU replies late.
REAL_TIME = ("fifo", "rr")
NAME, UUID = "soak", "6f1d8f5a-8f0b-4f63-a3a5-0c8d0f5c8d11"
DOMAIN = """<domain type='kvm'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <metadata>
    <p:hook xmlns:p='urn:qemu-prefault:1' restore='now' populate='{populate}' wait='{wait}'/>
  </metadata>
  <memory unit='MiB'>{mib}</memory>
  <os><type arch='x86_64' machine='{machine}'>hvm</type></os>
</domain>
"""
#: Seconds for a process that starts Python. Both guests may use all of the lab's only CPU.
SLOW_START = 240.0
HOOK = [sys.executable, "-m", "qemu_prefault", "libvirt", "hook"]
#: Parts of the hook's messages.
HOOK_MESSAGES = (
    "prefaulted before the guest runs",
    "will be prefaulted after it starts",
    "QEMU has the plugin",
    "started process",
)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Draw:
    """The parameters of an iteration.

    :ivar space: The size of the file system for both guests' memory, "tight" or "ample".
    :ivar limit: The limit of the guest's cgroup.
    :ivar filters: A key of FILTERS.
    :ivar policy: The scheduling of both guests' vCPUs.
    :ivar plugin: "plugin" or "preload", which is how QEMU loads the plugin, and the plugin's
        options. Empty if QEMU does not load the plugin.
    :ivar state: The guest's state when the action begins. "prelaunch" means that the guest
        has not booted. In all other states, the guest has booted or was restored.
    """

    machine: str
    smp: int
    backing: str
    space: str
    limit: str
    filters: str
    sandbox: bool
    policy: str
    allocator: str
    plugin: tuple[str, ...]
    state: str
    action: str
    options: tuple[str, ...]


def draw(moments: random.Random) -> Draw:
    choose = moments.choice
    backings = ["ram", "memfd", "memfd,share=off", "file", "file-private", "unlinked", "hugetlb"]
    actions = ["run", "run", "populate-only", "dry-run", "kill", "kill", "disturb", "disturb"]
    actions += ["two, one monitor", "two monitors", "neighbour too", "hook", "kill hook"]
    options = [(), (), ("--chunk", "64K"), ("--max-downtime", "0.02", "--chunk", "1M")]
    options += [("--populate", "all"), ("--populate", "resident"), ("--agent", "attach")]
    limits = ["none", "none", "memory-short", "memory-enough", "pids-few", "pids-some"]
    policy = choose(["other", "other", "quota", *POLICIES])
    # With real-time priority, a busy guest would delay QEMU's main thread on the lab's only CPU.
    # With SCHED_IDLE, a busy neighbour would leave no CPU time to the guest.
    busy = [] if policy in ("fifo", "rr", "idle") else ["busy", "busy"]
    return Draw(
        machine=choose(["pc", "pc", "q35", "microvm"]),
        smp=choose([1, 1, 2]),
        backing=choose(backings),
        space=choose(["tight", "ample"]),
        limit=choose(limits),
        filters=choose(["none", "none", "none", *FILTERS]),
        sandbox=choose([True, False]),
        policy=policy,
        allocator=choose(["none", "none", *ALLOCATORS]),
        plugin=choose([(), (), (), ("plugin",), ("plugin", "quirk=keep"), ("preload", "hold=0")]),
        state=choose(["prelaunch", "paused", "running", *busy]),
        action=choose(actions),
        options=choose(options),
    )


class States:
    """Saved states of booted guests."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def get(self, machine: str, smp: int) -> Path:
        path = self._directory / f"{machine}-{smp}"
        if not path.exists():
            with make_guest(machine=machine, smp=smp) as guest:
                guest.wait_ready()
                check_memory(guest)
                guest.save(path)
        return path


def make_guest(**options: Unpack[GuestOptions]) -> Guest:
    return Guest(memory_mib=RAM, workload_mib=WORKLOAD, **options)


@contextmanager
def enough_huge_pages(count: int) -> Iterator[bool]:
    with huge_pages(count):
        yield True


class Iteration:
    """A guest, its neighbour, and an action of the tool."""

    def __init__(
        self, moments: random.Random, states: States, directory: Path, stack: ExitStack
    ) -> None:
        self.moments = moments
        self.draw = draw(moments)
        self.states = states
        self.directory = directory
        self.stack = stack
        self.notes: list[str] = []
        self.outcomes: list[str] = []
        self.groups: dict[str, Path] = {}
        self.unified = False
        self.neighbours_group: Path | None = None
        self.guest_gap: float | None = None
        self.control_gap: float | None = None
        self.was_reset = False

    # --- limits and guests ---

    def enter(self, context: AbstractContextManager[_T]) -> _T | None:
        """Enter a context for the iteration.

        If the context skips the test, note the reason and return None.
        """
        try:
            return self.stack.enter_context(context)
        except pytest.skip.Exception as reason:
            self.notes.append(str(reason))
            return None

    def set_up(self) -> None:
        backings = self.make_source()
        wrapper = [*self.make_groups(), *(capable_prefix() if self.draw.plugin else [])]
        wrapper += [*self.filter_prefix(), *self.allocator_prefix()]
        # A restore reads all of a file's pages, and tmpfs allocates each page that is read.
        boots = self.draw.space == "tight" and self.draw.backing.startswith(("file", "unlinked"))
        self.neighbour = self.stack.enter_context(
            make_guest(
                backing=backings[1],
                incoming=None if boots else self.states.get("pc", 1),
                paused=not boots,
                wrapper=in_group(self.neighbours_group) if self.neighbours_group else [],
            )
        )
        self.start(self.neighbour, restored=not boots)
        prelaunch = self.draw.state == "prelaunch"
        restored = not boots and not prelaunch
        state = self.states.get(self.draw.machine, self.draw.smp) if restored else None
        self.second_qmp = self.directory / "second-qmp"
        args = ["-action", "reboot=reset", "-qmp", f"unix:{self.second_qmp},server=on,wait=off"]
        args += ["-name", f"guest={NAME},debug-threads=on", "-uuid", UUID]  # as libvirt does
        args += ["-sandbox", SANDBOX] if self.draw.sandbox else []
        plugin = self.draw.plugin
        self.guest = self.stack.enter_context(
            make_guest(
                machine=self.draw.machine,
                smp=self.draw.smp,
                backing=backings[0],
                incoming=state,
                paused=prelaunch or restored,
                args=args,
                wrapper=wrapper,
                plugin=list(plugin[1:]) if plugin else None,
                preload=plugin[:1] == ("preload",),
            )
        )
        if self.draw.state == "paused" and restored:
            self.guest.wait_restored()
        elif not prelaunch:
            self.start(self.guest, restored)
            if self.draw.state == "paused":
                self.guest.qmp("stop")
        self.limit_tasks()
        self.set_policy()
        if self.draw.state == "busy":
            self.guest.command("run")
            self.neighbour.command("run")

    @staticmethod
    def start(guest: Guest, restored: bool) -> None:
        """Wait until a guest is restored and resume it, or wait until a guest has booted."""
        if restored:
            guest.wait_restored()
            guest.qmp("cont")
        else:
            guest.wait_ready()
        check_memory(guest)

    def make_source(self) -> tuple[str, str]:
        """Make the source of both guests' memory, and return the backings."""
        kind = self.draw.backing
        if kind == "hugetlb" and not self.enter(enough_huge_pages(RAM)):  # for both guests
            kind = "memfd"
        if not kind.startswith(("file", "unlinked")):
            return kind, kind
        size = 2 * RAM - SHORT if self.draw.space == "tight" else 3 * RAM
        shm = self.enter(mounted("tmpfs", self.directory / "shm", f"size={size}M"))
        if shm is None:
            return "memfd", "memfd"
        if kind == "unlinked":  # QEMU creates a file in the directory and deletes it
            return f"file,mem-path={shm}", f"file,mem-path={shm}"
        return f"{kind},mem-path={shm}/guest", f"{kind},mem-path={shm}/neighbour"

    def make_groups(self) -> Sequence[str]:
        """Make the guest's cgroups and return the arguments to prepend to QEMU's command."""
        kind = self.draw.limit.partition("-")[0]
        wanted = [] if kind == "none" else [kind]
        wanted += ["cpu"] if self.draw.policy == "quota" else []
        prefix: list[str] = []
        for controller in wanted:
            if self.groups and self.unified:
                group_root(controller)  # enables the controller
                self.groups[controller] = next(iter(self.groups.values()))
                continue
            if (made := self.enter(cgroups(controller))) is None:
                continue
            (self.groups[controller],), self.unified = made
            self.stack.callback(remove_cpu_limits, self.groups[controller])
            prefix += in_group(self.groups[controller])
        if "cpu" in self.groups and (made := self.enter(cgroups("cpu"))) is not None:
            (self.neighbours_group,), _ = made
            self.stack.callback(remove_cpu_limits, self.neighbours_group)
        # A private mapping of a file can need each page twice, already during a restore.
        ram = 2 * RAM if self.draw.backing in ("memfd,share=off", "file-private") else RAM
        # QEMU itself uses about 60 MiB.
        limits = {"memory-short": ram + 24, "memory-enough": ram + 192}
        if (mib := limits.get(self.draw.limit)) and (group := self.groups.get("memory")):
            name = "memory.max" if self.unified else "memory.limit_in_bytes"
            (group / name).write_text(str(mib * MIB))
        return prefix

    def filter_prefix(self) -> Sequence[str]:
        filters = FILTERS[self.draw.filters]
        return [sys.executable, under_filter.__file__, *filters, "--"] if filters else []

    def allocator_prefix(self) -> Sequence[str]:
        if self.draw.allocator == "none" or self.draw.plugin[:1] == ("preload",):
            return []
        if not (found := sorted(LIBRARIES.glob(ALLOCATORS[self.draw.allocator]))):
            self.notes.append(f"{self.draw.allocator} is not installed")
            return []
        return ["env", f"LD_PRELOAD={found[0]}"]

    def limit_tasks(self) -> None:
        ranges = {"pids-few": (1, 8), "pids-some": (9, 80)}
        group = self.groups.get("pids")
        if group is not None and self.draw.limit in ranges:
            more = self.moments.randint(*ranges[self.draw.limit])
            used = int((group / "pids.current").read_text())
            (group / "pids.max").write_text(str(used + more))

    def set_policy(self) -> None:
        for guest, group in (
            (self.guest, self.groups.get("cpu")),
            (self.neighbour, self.neighbours_group),
        ):
            for tid in vcpu_threads(guest):
                if self.draw.policy != "quota":
                    set_policy(tid, self.draw.policy)
                elif group is not None:
                    limit_cpu(tid, group / "vcpu", self.unified)

    # --- the action ---

    def act(self) -> None:
        before = self.guest.status()
        if self.draw.action in ("hook", "kill hook"):
            self.call_hook()
        else:
            self.run_tools()
        wait_clean(self.guest.pid)
        wait_clean(self.neighbour.pid)
        if self.draw.action != "disturb":
            wait_for(lambda: self.guest.status() == before, f"the guest is {before} again")

    def run_tools(self) -> None:
        action = self.draw.action
        options = list(self.draw.options)
        if action in ("populate-only", "dry-run"):
            options.append(f"--{action}")
        elif not kvm.pre_fault_capability().available:
            options.append("--populate-only")
        tools = [start_tool(self.guest, *options)]
        if action == "two, one monitor":
            tools.append(start_tool(self.guest, *options))
        elif action == "two monitors":
            tools.append(Tool(["--qmp", str(self.second_qmp), "--json", *options]))
        elif action == "neighbour too":
            tools.append(start_tool(self.neighbour, *options))
        elif action == "kill":
            tools[0].running(3 * self.moments.random() ** 2)  # a run takes 0.3 s to 3 s
            tools[0].send_signal(signal.SIGKILL)
            tools[0].running(10)
        elif action == "disturb":
            self.disturb(tools[0])
        for tool in tools:
            killed = tool.status == -9
            self.outcomes.append("killed" if killed else self.outcome(tool.finish()))

    def outcome(self, result: Result) -> str:
        """Check that a run ended as documented, and return a summary of its result."""
        report = result.report
        if "error" in report:
            code = Code(result.error["code"])
            wanted = EXPECTED_ERRORS.get(code)
            if code is Code.MONITOR_TIMEOUT and self.draw.policy in REAL_TIME:
                wanted = ExitStatus.FAILED
            assert report["exit"] == result.status == wanted, result
            return f"{result.status} {code}"
        remaining = report["bytes"]["remaining"]
        assert result.status == (3 if remaining and not report["dry_run"] else 0), result
        return " ".join([str(result.status), *sorted(result.warnings)])

    def call_hook(self) -> None:
        """Call the libvirt hook as libvirt does for a guest that is being restored."""
        pid_file = self.directory / "libvirt/qemu/run" / f"{NAME}.pid"
        pid_file.parent.mkdir(parents=True)
        pid_file.write_text(str(self.guest.pid))
        populate = self.moments.choice(["auto", "all", "resident"])
        wait = self.moments.choice(["0.5", "30"])
        xml = DOMAIN.format(
            name=NAME, uuid=UUID, machine=self.draw.machine, mib=RAM, populate=populate, wait=wait
        )
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(self.directory)}
        for operation in ("restore", "started"):
            hook = subprocess.Popen(
                [*HOOK, NAME, operation, "begin", "-"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                text=True,
            )
            killed = operation == "started" and self.draw.action == "kill hook"
            try:
                seconds = 3 * self.moments.random() ** 2 if killed else SLOW_START
                output, log = hook.communicate(xml, timeout=seconds)
            except subprocess.TimeoutExpired:
                hook.kill()
                output, log = hook.communicate()
                assert killed, log
                self.outcomes.append("killed")
            else:
                assert (hook.returncode, output) == (0, ""), log
            self.check_hook_log(log)

    def check_hook_log(self, log: str) -> None:
        """Check what the hook logged, and wait until the process that it started has exited."""
        assert "report this bug" not in log, log
        self.outcomes += [name for name in HOOK_MESSAGES if name in log]
        if started := re.search(r"the hook started process (\d+)", log):
            # This process fails, because libvirtd does not run.
            process = Path("/proc", started[1])
            wait_for(lambda: not process.exists(), "the new process has exited", SLOW_START)

    def disturb(self, tool: Tool) -> None:
        """Stop, resume or reset the guest while the tool runs."""
        commands = self.moments.choices(["stop", "cont"], k=self.moments.randint(1, 4))
        # If host memory is too small for all of the guest's RAM, the guest may not survive a reset.
        scarce = self.draw.space == "tight" or self.draw.limit == "memory-short"
        # On L1's only CPU, SCHED_FIFO vCPUs that wait for each other in a loop never boot.
        stuck = self.draw.policy == "fifo" and self.draw.smp > 1
        resettable = not scarce and not stuck and self.draw.state != "prelaunch"
        if resettable and self.moments.random() < 0.5:
            commands.append("reset")
        for command in commands:
            tool.running(self.moments.random() ** 2)
            self.outcomes.append(command if tool.running() else f"({command})")
            if command == "reset":
                self.guest.reset()
                self.was_reset = True
            else:
                self.guest.qmp(command)

    # --- the checks ---

    def check(self) -> None:
        if self.guest.status() != "running":
            self.guest.qmp("cont")
        if self.draw.state == "prelaunch" or self.was_reset:
            self.guest.wait_ready()
        if self.draw.state == "busy":
            self.control_gap = self.stop_workload(self.neighbour)
            gap = self.stop_workload(self.guest) if not self.was_reset else None
            if self.draw.action != "disturb":  # which pauses the guest itself
                self.guest_gap = gap
        check_memory(self.guest)
        check_memory(self.neighbour)
        self.neighbour.command(f"alloc {PROMISED}")
        check_memory(self.neighbour)
        check_memory(self.guest)
        for guest in (self.guest, self.neighbour):
            assert guest.status() == "running" and guest.alive
            wait_clean(guest.pid)
        if "memory" in self.groups:
            assert out_of_memory_kills(self.groups["memory"]) == 0

    @staticmethod
    def stop_workload(guest: Guest) -> float:
        answer = guest.command("stop")
        assert answer["bad"] == 0, answer
        return float(answer["longest"])

    def describe(self) -> str:
        """Return a description of both QEMUs, for the report of a fault."""
        texts = []
        for name in ("guest", "neighbour"):
            guest: Guest | None = getattr(self, name, None)
            if guest is not None:
                state = "runs" if guest.alive else f"ended with {guest.process.returncode}"
                texts.append(f"{name}'s QEMU {state}: {guest.stderr.strip()[-500:]}")
        return "; ".join(texts)


def soak_once(states: States, directory: Path, entry: Entry) -> None:
    """Run one iteration, and add the results to the ledger entry."""
    which = f"--seed {entry['seed']} --iteration {entry['iteration']}"
    with ExitStack() as stack:
        iteration = Iteration(random.Random(which), states, directory, stack)
        entry["draw"] = asdict(iteration.draw)
        entry["outcomes"], entry["notes"] = iteration.outcomes, iteration.notes
        try:
            iteration.set_up()
            iteration.act()
            iteration.check()
        except Exception as error:
            error.add_note(f"{which}: {iteration.draw}")
            error.add_note(f"{iteration.outcomes}; {iteration.describe()}")
            raise
        entry["guest_gap"], entry["control_gap"] = iteration.guest_gap, iteration.control_gap


def test_soak(
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    seed: int,
    tmp_path: Path,
) -> None:
    minutes: float = request.config.getoption("minutes")
    only: int | None = request.config.getoption("iteration")
    ledger = Ledger(request.config.getoption("ledger"), seed)
    states = States(tmp_path)
    for number in itertools.count() if only is None else [only]:
        if only is None:
            if ledger.has(number):
                continue
            if number not in ledger.entries and ledger.seconds() >= 60 * minutes:
                break
        directory = tmp_path / str(number)
        directory.mkdir()
        entry: Entry = {"seed": seed, "iteration": number, "guest_gap": None, "control_gap": None}
        entry["fault"] = "not finished"
        started = time.monotonic()
        try:
            soak_once(states, directory, entry)
            entry["fault"] = ""
        except Exception as error:
            entry["fault"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            entry["seconds"] = round(time.monotonic() - started, 2)
            with capsys.disabled():
                print(f"\n{ledger.add(entry)}")
                if entry["fault"]:
                    print(f"--seed {seed}: {ledger.summary()}")
    with capsys.disabled():
        print(f"\n--seed {seed}: {ledger.summary()}")
