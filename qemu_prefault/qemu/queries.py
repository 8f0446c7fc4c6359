# SPDX-License-Identifier: GPL-2.0-or-later
"""Query QEMU's state: its machine, vCPUs, memory map, run state and migration state.

:mod:`.kvm_stats` queries KVM's counters.

This module has one subject, the :class:`VmState`, so it is longer than 400 lines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import Code, CommandError, LayoutError, MonitorError
from ..units import PAGE_SIZE
from .hmp import (
    FlatRange,
    parse_gpa2hva,
    parse_mtree,
    parse_numa,
    parse_ramblocks,
)
from .memory_map import (
    MemoryDevice,
    MemorySection,
    build_sections,
    is_ram_region,
    memdev_nodes,
    parse_memdevs,
    parse_memory_devices,
)
from .monitor import Monitor
from .qapi import expect_array, expect_bool, expect_int, expect_object, expect_str

#: Maximum number of memory ranges in a guest. Known machines have far fewer.
MAX_RANGES: Final = 4096

#: Types of confidential guests whose memory is in QEMU's ordinary mappings (target/i386/sev.c,
#: target/s390x/kvm/pv.c and hw/ppc/pef.c in QEMU).
WITHOUT_GUEST_MEMFD: Final = frozenset({"sev-guest", "s390-pv-guest", "pef-guest"})

#: The values of ``status`` in ``query-migrate`` if no migration is running.
MIGRATION_OVER: Final = frozenset({"none", "completed", "failed", "cancelled"})


@dataclass(frozen=True, slots=True)
class Vcpu:
    """One vCPU in the reply to ``query-cpus-fast``.

    ``thread_id`` is the id of the vCPU's thread in QEMU's own pid namespace. ``node`` is the guest
    NUMA node, or None if QEMU does not report the node.
    """

    index: int
    thread_id: int
    qom_path: str
    node: int | None


@dataclass(frozen=True, slots=True)
class Balloon:
    """The memory balloon of a guest.

    :ivar actual: The guest's current memory in bytes.
    :ivar total: The guest's memory in bytes if the balloon is fully deflated.
    """

    actual: int
    total: int


@dataclass(frozen=True, slots=True)
class VmState:
    """The state of a QEMU process and its guest at one point in time.

    :ivar version: QEMU's version, e.g. ``10.0.13``.
    :ivar machine_type: The machine type, e.g. ``pc-q35-10.0-machine``, or None if QEMU does not
        report it.
    :ivar status: The run state (``query-status``): ``running``, ``paused``, ``prelaunch`` …
    :ivar running: Whether the vCPUs run.
    :ivar kvm: Whether the guest runs under KVM.
    :ivar migration: The status of a migration (``query-migrate``), or None without a migration.
    :ivar dirty_rate: The status of the dirty-rate measurement (``query-dirty-rate``), or None if
        QEMU does not report it.
    :ivar balloon: The balloon, or None if the guest has no working balloon.
    :ivar private_memory: The type of a confidential guest whose private memory is in guest_memfd
        (for example ``sev-snp-guest``), or None for other guests.
    """

    version: str
    machine_type: str | None
    status: str
    running: bool
    kvm: bool
    vcpus: tuple[Vcpu, ...]
    ranges: tuple[FlatRange, ...]
    sections: tuple[MemorySection, ...]
    memory_devices: tuple[MemoryDevice, ...]
    balloon: Balloon | None
    migration: str | None
    dirty_rate: str | None
    private_memory: str | None = None


#: The time limit for the negotiation and :func:`read_vm_state` together in seconds, for a QEMU that
#: is not loading a guest. The second limit applies after a slow negotiation.
STATE_SECONDS = 6.0
LEAST_STATE_SECONDS = 3.0
#: The same for a connection by libvirt, which waits while it uses the monitor itself.
LIBVIRT_STATE_SECONDS = 60.0


async def read_vm_state_in_time(monitor: Monitor, seconds: float = STATE_SECONDS) -> VmState:
    """Call :func:`read_vm_state` with the time limit that :data:`STATE_SECONDS` describes.

    :param seconds: The limit in seconds.
    :raises MonitorError: If QEMU does not reply to all queries in time, or if
        :func:`read_vm_state` raises this error.
    """
    limit = max(LEAST_STATE_SECONDS, seconds - monitor.negotiation_seconds)
    try:
        async with asyncio.timeout(limit):
            return await read_vm_state(monitor)
    except TimeoutError:
        raise MonitorError(
            f"QEMU did not reply to all queries within {limit:.0f} s",
            "check whether QEMU is stopped or its main loop is blocked",
            code=Code.MONITOR_TIMEOUT,
        ) from None


async def read_vm_state(monitor: Monitor) -> VmState:
    """Return the QEMU state that is necessary to plan a prefault.

    The function sends the queries without waiting for the reply to each query. It reads the memory
    map before and after the host addresses. If firmware or hotplug has changed the map in the
    meantime, the function repeats all queries, for up to 10 attempts in total.

    :raises LayoutError: If the replies contradict each other.
    :raises MonitorError: If a query failed, or if the memory map changed during every attempt.
    """
    for _ in range(10):
        state = await _read_once(monitor)
        if state is not None:
            return state
    raise MonitorError(
        "the guest's memory map changed during every attempt to read it",
        "run qemu-prefault again in a few seconds, because the guest's firmware is probably still "
        "running",
        code=Code.LAYOUT_UNSTABLE,
    )


async def read_running(monitor: Monitor) -> bool:
    """Return whether the guest's vCPUs are running."""
    run = expect_object(await monitor.execute("query-status"), "query-status")
    return expect_bool(run.get("running"), "running of query-status")


async def read_status(monitor: Monitor) -> str:
    """Return the current run state, which is the ``status`` of ``query-status``."""
    run = expect_object(await monitor.execute("query-status"), "query-status")
    return expect_str(run.get("status"), "status of query-status")


async def read_migration(monitor: Monitor) -> str:
    """Return the ``status`` of ``query-migrate``, or ``none`` without a migration."""
    migrate = expect_object(await monitor.execute("query-migrate"), "query-migrate")
    return expect_str(migrate.get("status", "none"), "status of query-migrate")


async def _read_once(monitor: Monitor) -> VmState | None:
    """Return QEMU's state, or None if the memory map changed during the queries."""
    (
        status,
        kvm,
        cpus,
        mtree,
        ramblock,
        memdev,
        devices,
        summary,
        numa,
        balloon,
        migrate,
        dirty_rate,
        machine_type,
    ) = await _all(
        monitor.execute("query-status"),
        monitor.execute("query-kvm"),
        monitor.execute("query-cpus-fast"),
        monitor.hmp("info mtree -f"),
        monitor.hmp("info ramblock"),
        monitor.execute("query-memdev"),
        monitor.execute("query-memory-devices"),
        monitor.execute("query-memory-size-summary"),
        monitor.hmp("info numa"),
        _optional(monitor.execute("query-balloon")),
        _optional(monitor.execute("query-migrate")),
        _optional(monitor.execute("query-dirty-rate")),
        _optional(monitor.execute("qom-get", path="/machine", property="type")),
    )
    run = expect_object(status, "query-status")
    kvm_info = expect_object(kvm, "query-kvm")
    enabled = expect_bool(kvm_info.get("enabled"), "enabled of query-kvm")
    ranges = parse_mtree(expect_str(mtree, "info mtree"))
    if len(ranges) > MAX_RANGES:
        raise LayoutError(
            f"the guest's memory map contains {len(ranges)} ranges, more than {MAX_RANGES}"
        )
    blocks = parse_ramblocks(expect_str(ramblock, "info ramblock"))
    memdevs = parse_memdevs(memdev)
    memory_devices = parse_memory_devices(devices)
    nodes = parse_numa(expect_str(numa, "info numa"))

    ids = [memdev.id for memdev in memdevs]
    mapped = await _host_addresses(monitor, ranges, ids)
    if mapped is None:
        return None
    in_map = {item.name for item in ranges} & set(ids)
    device_owned = await _device_owned(monitor, in_map, memory_devices)
    sections = build_sections(
        ranges,
        blocks,
        memdevs,
        memory_devices,
        mapped,
        kvm=enabled,
        node_of=memdev_nodes(
            [item for item in ranges if item.name not in device_owned],
            memdevs,
            memory_devices,
            nodes,
        ),
        device_owned=device_owned,
    )
    return VmState(
        version=monitor.version,
        machine_type=_str_or_none(machine_type),
        status=expect_str(run.get("status"), "status of query-status"),
        running=expect_bool(run.get("running"), "running of query-status"),
        kvm=enabled,
        vcpus=_vcpus(cpus),
        ranges=ranges,
        sections=sections,
        memory_devices=memory_devices,
        balloon=_balloon(balloon, summary, memory_devices),
        migration=_member(migrate, "status", "query-migrate"),
        dirty_rate=_member(dirty_rate, "status", "query-dirty-rate"),
        private_memory=await _private_memory(monitor),
    )


async def _private_memory(monitor: Monitor) -> str | None:
    """Return the type of a confidential guest with guest_memfd, see :class:`VmState`."""
    prop = "confidential-guest-support"
    link = await _optional(monitor.execute("qom-get", path="/machine", property=prop))
    if not isinstance(link, str) or not link.startswith("/"):
        return None
    kind = await _optional(monitor.execute("qom-get", path=link, property="type"))
    name = kind if isinstance(kind, str) else "confidential guest"
    return None if name in WITHOUT_GUEST_MEMFD else name


async def _all(*awaitables: Awaitable[object]) -> list[object]:
    """Await all awaitables, and return their results.

    If an awaitable fails, cancel the other awaitables and wait until they have ended.
    """
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _optional(awaitable: Awaitable[object]) -> object | None:
    """Return a command's reply, or None if this QEMU lacks or refuses the command."""
    try:
        return await awaitable
    except CommandError:
        return None


async def _host_addresses(
    monitor: Monitor, ranges: Sequence[FlatRange], memdevs: Collection[str]
) -> dict[int, int] | None:
    """Return the host address of each range of RAM and ROM.

    The keys of the result are guest-physical addresses. The function queries the host addresses of
    the first and the last page of each range. With these addresses, the function checks that the
    range is also contiguous in QEMU's address space. While a guest moves a BAR, the address of this
    device memory may be unknown. In this case, the result omits the range.

    :param memdevs: The ids of all memory backends.
    :returns: The addresses, or None if guest RAM has moved during the queries.
    """
    wanted = [r for r in ranges if r.kind in ("ram", "rom") and r.size >= PAGE_SIZE]
    # QEMU queues at most 8 requests (QMP_REQ_QUEUE_LEN_MAX, monitor/qmp.c) and then stops
    # reading. More requests wait in the socket; the batches limit the number of asyncio tasks, and
    # the memory for replies.
    found: dict[int, int] = {}
    unknown: LayoutError | None = None
    for batch in (wanted[start : start + 32] for start in range(0, len(wanted), 32)):
        asked = [gpa for r in batch for gpa in (r.start, (r.end - 1) // PAGE_SIZE * PAGE_SIZE)]
        answers = await _all(*(monitor.hmp(f"gpa2hva {gpa:#x}") for gpa in asked))
        for item, first, last in zip(batch, answers[::2], answers[1::2], strict=True):
            try:
                found[item.start] = _host_address(item, first, last)
            except LayoutError as error:
                if is_ram_region(item.name, memdevs):
                    unknown = unknown or error

    def guest_ram(view: Sequence[FlatRange]) -> list[FlatRange]:
        return [item for item in view if is_ram_region(item.name, memdevs)]

    if guest_ram(parse_mtree(await monitor.hmp("info mtree -f"))) != guest_ram(ranges):
        return None
    if unknown is not None:
        raise unknown
    return found


def _host_address(item: FlatRange, first: object, last: object) -> int:
    (name, hva), (last_name, last_hva) = (
        parse_gpa2hva(expect_str(answer, "gpa2hva")) for answer in (first, last)
    )
    distance = (item.end - 1) // PAGE_SIZE * PAGE_SIZE - item.start
    if {name, last_name} != {item.name} or last_hva - hva != distance:
        raise LayoutError(
            f"memory {item.name!r} at {item.start:#x} is not contiguous in QEMU",
            "run qemu-prefault again, because the memory map may have changed during the queries",
        )
    return hva


async def _device_owned(
    monitor: Monitor, memdevs: Collection[str], memory_devices: Sequence[MemoryDevice]
) -> frozenset[str]:
    """Return the ids of backends that belong to devices other than memory devices.

    Memory devices and the machine own the backends of guest RAM. The machine's backends come from
    its memory-backend property or from -numa node,memdev=. Other devices also own backends, for
    example ivshmem-plain, NVMe (pmrdev) and CXL devices. No query reports the owners of these
    backends. Therefore this function reads the QOM links of all devices.

    :param memdevs: The ids of the backends to examine.
    """
    unclaimed = set(memdevs) - {device.memdev for device in memory_devices}
    boot = await _optional(monitor.execute("qom-get", path="/machine", property="memory-backend"))
    if isinstance(boot, str):
        unclaimed.discard(boot.rsplit("/", 1)[-1])
    if not unclaimed:
        return frozenset()
    owned = set()
    for parent in ("/machine/peripheral", "/machine/peripheral-anon"):
        for device in await _qom_list(monitor, parent):
            if not device[1].startswith("child<"):
                continue
            path = f"{parent}/{device[0]}"
            for name, kind in await _qom_list(monitor, path):
                if kind == "link<memory-backend>":
                    link = await _optional(monitor.execute("qom-get", path=path, property=name))
                    if isinstance(link, str):
                        owned.add(link.rsplit("/", 1)[-1])
    return frozenset(unclaimed & owned)


async def _qom_list(monitor: Monitor, path: str) -> list[tuple[str, str]]:
    """Return the names and types of the properties of a QOM object.

    The result is empty if the object does not exist.
    """
    answer = await _optional(monitor.execute("qom-list", path=path))
    if answer is None:
        return []
    entries = [expect_object(item, "qom-list") for item in expect_array(answer, "qom-list")]
    return [
        (expect_str(e.get("name"), "qom-list"), expect_str(e.get("type"), "qom-list"))
        for e in entries
    ]


def _vcpus(value: object) -> tuple[Vcpu, ...]:
    vcpus = []
    for item in expect_array(value, "query-cpus-fast"):
        entry = expect_object(item, "an entry of query-cpus-fast")
        props = expect_object(entry.get("props", {}), "props of a vCPU")
        node = props.get("node-id")
        vcpus.append(
            Vcpu(
                index=expect_int(entry.get("cpu-index"), "cpu-index of a vCPU", 0, 1 << 20),
                # PID_MAX_LIMIT, include/linux/threads.h
                thread_id=expect_int(entry.get("thread-id"), "thread-id of a vCPU", 1, 1 << 22),
                qom_path=expect_str(entry.get("qom-path"), "qom-path of a vCPU"),
                node=None if node is None else expect_int(node, "node-id of a vCPU", 0, 1023),
            )
        )
    if not vcpus:
        raise MonitorError("query-cpus-fast lists no vCPU", "check that the socket belongs to QEMU")
    if len({vcpu.qom_path for vcpu in vcpus}) != len(vcpus):
        raise MonitorError(
            "query-cpus-fast lists a vCPU twice", "check that the socket belongs to QEMU"
        )
    return tuple(sorted(vcpus, key=lambda vcpu: vcpu.index))


def _balloon(
    answer: object | None, summary: object, devices: Sequence[MemoryDevice]
) -> Balloon | None:
    if answer is None:
        return None
    actual = expect_int(expect_object(answer, "query-balloon").get("actual"), "the balloon")
    base = expect_int(
        expect_object(summary, "query-memory-size-summary").get("base-memory"), "base-memory"
    )
    # "actual" counts only boot memory and DIMMs (get_current_ram_size(),
    # hw/virtio/virtio-balloon.c).
    return Balloon(actual, base + sum(d.size for d in devices if d.kind == "dimm"))


def _member(answer: object | None, key: str, what: str) -> str | None:
    if answer is None:
        return None
    value = expect_object(answer, what).get(key)
    return None if value is None else expect_str(value, f"{key} of {what}")


def _str_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None
