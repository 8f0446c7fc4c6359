# SPDX-License-Identifier: GPL-2.0-or-later
"""Test a run's preconditions, its choice of memory, and its division of work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_prefault.agents.base import Kind, Range, Worker
from qemu_prefault.engine.options import Options, Populate
from qemu_prefault.engine.plan import Target, partition, partition_by_node, select, subtract
from qemu_prefault.engine.preflight import check_vm_state
from qemu_prefault.errors import ExitStatus, InputError, RefusedError
from qemu_prefault.qemu.memory_map import MemorySection
from qemu_prefault.qemu.queries import Balloon, VmState
from qemu_prefault.units import HUGE_PAGE_SIZE, PAGE_SIZE

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
HVA = 0x7F00_0000_0000


def section(gpa: int, size: int, **changes: object) -> MemorySection:
    plain = MemorySection(
        name="pc.ram",
        gpa=gpa,
        size=size,
        hva=HVA + gpa,
        offset=gpa,
        page_size=PAGE_SIZE,
        memdev="pc.ram",
        device=None,
        share=False,
        reserve=True,
        node=None,
        skipped=None,
        skip_code=None,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def machine(*sections: MemorySection, **changes: object) -> VmState:
    plain = VmState(
        version="10.0.13",
        machine_type="pc-q35-10.0-machine",
        status="paused",
        running=False,
        kvm=True,
        vcpus=(),
        ranges=(),
        sections=sections,
        memory_devices=(),
        balloon=None,
        migration=None,
        dirty_rate=None,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


# --- refusing a run ---

# All values of RunState and MigrationStatus (qapi/run-state.json, qapi/migration.json, QEMU 11.1).
FIT_STATUS = ["running", "paused", "prelaunch", "suspended", "watchdog", "io-error", "debug"]
UNFIT_STATUS = {
    "inmigrate": "incoming",
    "restore-vm": "incoming",
    "postmigrate": "migration",
    "finish-migrate": "migration",
    "save-vm": "migration",
    "colo": "dirty-logging",
    "internal-error": "guest-state",
    "shutdown": "guest-state",
    "guest-panicked": "guest-state",
}
OVER = [None, "none", "completed", "failed", "cancelled"]
UNDER_WAY = [
    *("setup", "cancelling", "active", "colo", "pre-switchover", "device", "wait-unplug"),
    *("failing", "some-status-of-a-future-qemu"),
]
POSTCOPY = [
    *("postcopy-active", "postcopy-paused", "postcopy-recover", "postcopy-recover-setup"),
    "postcopy-device",
]
NOT_MEASURING = [None, "unstarted", "measured"]


def expected_refusal(status: str, migration: str | None, rate: str | None, limit: bool) -> str:
    """Return the code of the expected refusal, or "" if the state is accepted.

    The most specific state has priority.
    """
    if migration in POSTCOPY:
        return "postcopy"
    if status in UNFIT_STATUS:
        return UNFIT_STATUS[status]
    if migration in UNDER_WAY:
        return "migration"
    return "dirty-logging" if rate == "measuring" or limit else ""


@pytest.mark.parametrize("status", [*FIT_STATUS, *UNFIT_STATUS])
def test_every_state_is_accepted_or_refused_by_code(status: str) -> None:
    rates = [*NOT_MEASURING, "measuring"]
    for migration, rate, limit in product([*OVER, *UNDER_WAY, *POSTCOPY], rates, [False, True]):
        vm = machine(status=status, migration=migration, dirty_rate=rate)
        code = expected_refusal(status, migration, rate, limit)
        if not code:
            check_vm_state(vm, limit)
            continue
        with pytest.raises(RefusedError) as caught:
            check_vm_state(vm, limit)
        assert caught.value.code == code, (status, migration, rate, limit)
        assert caught.value.exit_status == ExitStatus.REFUSED
        assert caught.value.remedy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "inmigrate"}, ["not loaded", "query-status: inmigrate", "-S"]),
        ({"migration": "active"}, ["query-migrate: active", "destination"]),
        ({"migration": "postcopy-paused"}, ["postcopy", "source"]),
        ({"dirty_rate": "measuring"}, ["measured", "query-dirty-rate"]),
        ({"status": "postmigrate"}, ["destination"]),
    ],
)
def test_refusal_has_qemu_state_and_remedy(changes: dict[str, str], words: list[str]) -> None:
    with pytest.raises(RefusedError) as caught:
        check_vm_state(machine(**changes))
    for word in words:
        assert word in str(caught.value)


def test_dirty_limit_differs_from_measurement() -> None:
    with pytest.raises(RefusedError, match="being limited"):
        check_vm_state(machine(), dirty_limit=True)


# --- selecting memory ---

LOW = section(0, 640 * KIB)
MAIN = section(MIB, 255 * MIB)
HIGH = section(4 * GIB, GIB)
ROM = section(0xC0000, 128 * KIB, name="pc.rom", skipped="ROM", skip_code="rom")


def pieces(targets: Sequence[Target]) -> list[tuple[int, int]]:
    return [(target.gpa, target.size) for target in targets]


def ranges(*wanted: tuple[int, int], **changes: object) -> Options:
    return replace(Options(ranges=wanted), **changes)  # type: ignore[arg-type]


def test_default_is_all_ram_in_address_order() -> None:
    targets = select(machine(HIGH, ROM, MAIN, LOW), Options())
    assert [target.section for target in targets] == [LOW, MAIN, HIGH]
    assert pieces(targets) == [(s.gpa, s.size) for s in (LOW, MAIN, HIGH)]
    assert all(target.may_populate and target.why_not is None for target in targets)


def test_target_has_host_address() -> None:
    (target,) = select(machine(MAIN), ranges((16 * MIB, MIB)))
    assert target.hva == HVA + 16 * MIB


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        pytest.param([(2 * MIB, MIB)], [(2 * MIB, MIB)], id="inside"),
        pytest.param([(2 * MIB + 1, 1)], [(2 * MIB, PAGE_SIZE)], id="one byte selects its page"),
        pytest.param(
            [(2 * MIB + PAGE_SIZE - 1, 2)], [(2 * MIB, 2 * PAGE_SIZE)], id="two bytes across pages"
        ),
        pytest.param(
            [(4 * MIB, MIB), (2 * MIB, MIB)],
            [(2 * MIB, MIB), (4 * MIB, MIB)],
            id="ranges are sorted",
        ),
        pytest.param(
            [(2 * MIB, 2 * MIB), (3 * MIB, 2 * MIB)],
            [(2 * MIB, 2 * MIB), (4 * MIB, MIB)],
            id="overlaps are merged",
        ),
        pytest.param(
            [(2 * MIB, 4 * MIB), (3 * MIB, MIB)], [(2 * MIB, 4 * MIB)], id="one inside another"
        ),
        pytest.param(
            [(2 * MIB + 1, 10), (2 * MIB + 20, 10)], [(2 * MIB, PAGE_SIZE)], id="two in one page"
        ),
        pytest.param([(0, 2 * MIB)], [(0, 640 * KIB), (MIB, MIB)], id="across the VGA hole"),
        pytest.param(
            [(255 * MIB, 4 * GIB)],
            [(255 * MIB, MIB), (4 * GIB, 255 * MIB)],
            id="across the PCI hole",
        ),
        pytest.param([(0, 1 << 51)], [(0, 640 * KIB), (MIB, 255 * MIB), (4 * GIB, GIB)], id="all"),
        pytest.param([(GIB, MIB), (4 * GIB, MIB)], [(4 * GIB, MIB)], id="one in a hole, one not"),
    ],
)
def test_ranges(wanted: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    assert pieces(select(machine(LOW, ROM, MAIN, HIGH), ranges(*wanted))) == expected


@pytest.mark.parametrize(
    "wanted", [(GIB, MIB), (8 * GIB, 1), (0xC0000, 128 * KIB)], ids=["hole", "beyond", "ROM"]
)
def test_range_without_ram_is_a_usage_error(wanted: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="qemu-prefault map") as caught:
        select(machine(LOW, ROM, MAIN, HIGH), ranges(wanted))
    assert caught.value.exit_status == ExitStatus.USAGE


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0, []),
        (PAGE_SIZE, [(0, PAGE_SIZE)]),
        (PAGE_SIZE - 1, []),
        (10_000, [(0, 2 * PAGE_SIZE)]),
        (640 * KIB, [(0, 640 * KIB)]),
        (MIB, [(0, 640 * KIB), (MIB, 384 * KIB)]),
        (1 << 50, [(0, 640 * KIB), (MIB, 255 * MIB), (4 * GIB, GIB)]),
    ],
)
def test_max_bytes_is_a_bound_in_whole_pages(budget: int, expected: list[tuple[int, int]]) -> None:
    vm = machine(HIGH, MAIN, LOW)
    assert pieces(select(vm, Options(max_bytes=budget))) == expected


def test_max_bytes_applies_to_ranges() -> None:
    policy = ranges((2 * MIB, MIB), (4 * MIB, MIB), max_bytes=MIB + PAGE_SIZE)
    assert pieces(select(machine(MAIN), policy)) == [(2 * MIB, MIB), (4 * MIB, PAGE_SIZE)]


@given(
    st.lists(st.tuples(st.integers(0, 6 * GIB), st.integers(1, GIB)), min_size=1, max_size=6),
    st.none() | st.integers(0, 2 * GIB),
)
def test_selection_is_sorted_unique_whole_pages(
    wanted: list[tuple[int, int]], budget: int | None
) -> None:
    vm = machine(HIGH, ROM, MAIN, LOW)
    try:
        targets = select(vm, ranges(*wanted, max_bytes=budget))
    except InputError:
        ram = [(s.gpa, s.end) for s in (LOW, MAIN, HIGH)]
        assert not any(a < end and start < a + n for a, n in wanted for start, end in ram)
        return
    for target in targets:
        assert target.gpa % PAGE_SIZE == target.size % PAGE_SIZE == 0 < target.size
        assert target.section.gpa <= target.gpa
        assert target.gpa + target.size <= target.section.end
    for before, after in pairwise(targets):
        assert before.gpa + before.size <= after.gpa
    if budget is not None:
        assert sum(target.size for target in targets) <= budget


# --- populating memory ---

ABSENT_ON_PURPOSE = {
    "virtio-mem": (section(4 * GIB, GIB, device="virtio-mem"), None),
    "reserve=off": (section(MIB, GIB, reserve=False), None),
    "shared nvdimm": (section(4 * GIB, GIB, device="nvdimm", share=True), None),
    "nvdimm, sharing unknown": (section(4 * GIB, GIB, device="nvdimm", share=None), None),
    "shared virtio-pmem": (section(4 * GIB, GIB, device="virtio-pmem", share=True), None),
    "inflated balloon": (section(MIB, GIB), Balloon(actual=GIB - PAGE_SIZE, total=GIB)),
}
PRESENT = {
    "boot RAM": (section(MIB, GIB), None),
    "shared boot RAM": (section(MIB, GIB, share=True), None),
    "a DIMM": (section(4 * GIB, GIB, device="dimm"), None),
    "private nvdimm": (section(4 * GIB, GIB, device="nvdimm", share=False), None),
    "reserve unknown": (section(MIB, GIB, reserve=None), None),
    "deflated balloon": (section(MIB, GIB), Balloon(actual=GIB, total=GIB)),
}


@pytest.mark.parametrize("name", ABSENT_ON_PURPOSE)
def test_auto_skips_intentionally_absent_memory(name: str) -> None:
    ram, balloon = ABSENT_ON_PURPOSE[name]
    (target,) = select(machine(ram, balloon=balloon), Options(Populate.AUTO))
    assert not target.may_populate
    assert target.why_not


def test_auto_skips_the_shared_copy_of_private_memory() -> None:
    vm = machine(section(MIB, GIB), private_memory="sev-snp-guest")
    (target,) = select(vm, Options(Populate.AUTO))
    assert not target.may_populate
    assert "sev-snp-guest" in (target.why_not or "")
    assert select(vm, Options(Populate.ALL))[0].may_populate


@pytest.mark.parametrize("name", PRESENT)
def test_auto_populates_ordinary_memory(name: str) -> None:
    ram, balloon = PRESENT[name]
    (target,) = select(machine(ram, balloon=balloon), Options(Populate.AUTO))
    assert target.may_populate


@pytest.mark.parametrize("name", [*ABSENT_ON_PURPOSE, *PRESENT])
def test_all_populates_everything_and_resident_nothing(name: str) -> None:
    ram, balloon = (ABSENT_ON_PURPOSE | PRESENT)[name]
    vm = machine(ram, balloon=balloon)
    (target,) = select(vm, Options(Populate.ALL))
    assert target.may_populate and target.why_not is None
    (target,) = select(vm, Options(Populate.RESIDENT))
    assert not target.may_populate and target.why_not


spans = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=6)


@given(spans, spans)
def test_remaining_has_every_page_once(
    wanted: list[tuple[int, int]], done: list[tuple[int, int]]
) -> None:
    def targets(spans: list[tuple[int, int]]) -> list[Target]:
        return [
            Target(
                section(start * PAGE_SIZE, size * PAGE_SIZE),
                start * PAGE_SIZE,
                size * PAGE_SIZE,
                True,
            )
            for start, size in spans
        ]

    def pages(targets: Sequence[Target]) -> list[int]:
        return [page for t in targets for page in range(t.gpa, t.gpa + t.size, PAGE_SIZE)]

    gone = set(pages(targets(done)))
    for target in targets(wanted):
        left = subtract([target], targets(done))
        assert pages(left) == [page for page in pages([target]) if page not in gone]
        assert all(piece.section is target.section for piece in left)


def test_absent_section_does_not_affect_others() -> None:
    vm = machine(MAIN, section(4 * GIB, GIB, device="virtio-mem"))
    assert [target.may_populate for target in select(vm, Options())] == [True, False]


# --- distributing work ---


@st.composite
def work(draw: st.DrawFn) -> list[Range]:
    """Draw disjoint page-aligned ranges of up to 1 GiB, in ascending order."""
    found = []
    page = draw(st.integers(0, 1 << 20))
    for _ in range(draw(st.integers(0, 12))):
        page += draw(st.integers(0, 2000))
        count = draw(st.integers(1, 4) | st.integers(500, 1100) | st.integers(1, 1 << 18))
        found.append(Range(Kind.STAGE2, page * PAGE_SIZE, count * PAGE_SIZE))
        page += count
    return found


def worker_list(nodes: Sequence[int | None]) -> list[Worker]:
    return [Worker(3 * number + 1, None, node) for number, node in enumerate(nodes)]


def flat(shares: dict[int, list[Range]]) -> list[Range]:
    return sorted((item for share in shares.values() for item in share), key=lambda r: r.start)


def check_exactly_once(shares: dict[int, list[Range]], ranges: Sequence[Range]) -> None:
    """Check that the workers' shares contain each byte of the ranges exactly once."""

    def joined(items: Sequence[Range]) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for item in items:
            if found and found[-1][1] == item.start:
                found[-1] = (found[-1][0], item.start + item.size)
            else:
                found.append((item.start, item.start + item.size))
        return found

    pieces = flat(shares)
    assert all(piece.size > 0 for piece in pieces)
    assert all(a.start + a.size <= b.start for a, b in pairwise(pieces))
    assert joined(pieces) == joined(sorted(ranges, key=lambda r: r.start))


@given(work(), st.integers(1, 9))
def test_stripes_cover_every_byte_once_in_order(ranges: list[Range], count: int) -> None:
    workers = worker_list([None] * count)
    shares = partition(ranges, workers)
    assert list(shares) == [worker.index for worker in workers]
    check_exactly_once(shares, ranges)
    in_worker_order = [item for worker in workers for item in shares[worker.index]]
    assert in_worker_order == flat(shares)
    assert {item.kind for item in in_worker_order} <= {Kind.STAGE2}


@given(work(), st.integers(1, 9))
def test_huge_pages_are_not_split(ranges: list[Range], count: int) -> None:
    ends = {item.start + item.size for item in ranges}
    for item in flat(partition(ranges, worker_list([None] * count))):
        assert (item.start + item.size) in ends or (item.start + item.size) % HUGE_PAGE_SIZE == 0


@given(work(), st.integers(1, 9))
def test_shares_are_equal_within_a_huge_page(ranges: list[Range], count: int) -> None:
    equal = sum(item.size for item in ranges) / count
    for share in partition(ranges, worker_list([None] * count)).values():
        assert abs(sum(item.size for item in share) - equal) < HUGE_PAGE_SIZE + PAGE_SIZE


def test_unaligned_memory_is_shared_evenly() -> None:
    """Check that the last worker gets memory although shares are rounded up to 2 MiB."""
    ranges = [Range(Kind.POPULATE, HVA + PAGE_SIZE, 64 * MIB)]
    sizes = [sum(r.size for r in s) for s in partition(ranges, worker_list([None] * 24)).values()]
    assert max(sizes) <= 64 * MIB / 24 + HUGE_PAGE_SIZE
    assert sizes[-1] > 0


def test_no_work_gives_empty_shares() -> None:
    assert partition([], worker_list([None, None])) == {1: [], 4: []}


nodes = st.none() | st.integers(0, 3)


@given(work(), st.data())
def test_each_byte_goes_to_a_local_vcpu_if_any(ranges: list[Range], data: st.DataObject) -> None:
    workers = worker_list(data.draw(st.lists(nodes, min_size=1, max_size=8)))
    home = [data.draw(nodes) for _ in ranges]
    shares = partition_by_node(list(zip(home, ranges, strict=True)), workers)
    assert list(shares) == [worker.index for worker in workers]
    check_exactly_once(shares, ranges)
    have = {worker.node for worker in workers} - {None}
    for worker in workers:
        for piece in shares[worker.index]:
            (node,) = (
                n
                for n, r in zip(home, ranges, strict=True)
                if r.start <= piece.start < r.start + r.size
            )
            assert node == worker.node or node not in have


def test_memory_of_a_node_without_vcpus_is_shared() -> None:
    shares = partition_by_node([(2, Range(Kind.POPULATE, HVA, 8 * MIB))], worker_list([0, 1]))
    assert [sum(r.size for r in share) for share in shares.values()] == [4 * MIB, 4 * MIB]
