# SPDX-License-Identifier: GPL-2.0-or-later
"""Query KVM's counters with QMP's ``query-stats``."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import CommandError
from ..host.kvm import Stage2Leaves
from .monitor import Monitor
from .qapi import expect_array, expect_int, expect_object, expect_str


async def read_stage2(monitor: Monitor) -> Stage2Leaves | None:
    """Return KVM's counts of stage-2 leaves, or None if QEMU does not report them.

    QEMU 7.1 and later report the counts with ``query-stats`` if the kernel has
    KVM_CAP_BINARY_STATS_FD. KVM counts leaf SPTEs (``kvm_update_page_stats()``, arch/x86/kvm/mmu).

    :raises MonitorError: If the query fails.
    """
    names = ("pages_4k", "pages_2m", "pages_1g")
    answer = await _query_stats(monitor, "vm", names)
    if not answer:
        return None
    stats = _stats(answer[0])
    if not set(names) <= stats.keys():
        return None
    return Stage2Leaves(*(stats[name] for name in names))


async def read_vcpu_stats(monitor: Monitor, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return KVM's counters for each vCPU, by the vCPU's QOM path.

    The result is empty if QEMU reports no counters.

    :param names: The names of the counters, for example ``pf_taken``, ``pf_fixed`` and ``exits``.
        The result omits unknown names.
    :raises MonitorError: If the query fails.
    """
    found = {}
    for item in await _query_stats(monitor, "vcpu", names):
        entry = expect_object(item, "an entry of query-stats")
        found[expect_str(entry.get("qom-path"), "qom-path of query-stats")] = _stats(entry)
    return found


async def _query_stats(monitor: Monitor, target: str, names: Sequence[str]) -> Sequence[object]:
    """Return KVM's entries in the reply to ``query-stats``.

    The result is empty if QEMU refuses the query.
    """
    providers = [{"provider": "kvm", "names": list(names)}]
    try:
        answer = await monitor.execute("query-stats", target=target, providers=providers)
    except CommandError:
        return ()
    return [
        item
        for item in expect_array(answer, "query-stats")
        if expect_object(item, "an entry of query-stats").get("provider") == "kvm"
    ]


def _stats(item: object) -> dict[str, int]:
    entry = expect_object(item, "an entry of query-stats")
    values = {}
    for stat in expect_array(entry.get("stats"), "stats of query-stats"):
        pair = expect_object(stat, "a value of query-stats")
        name, value = expect_str(pair.get("name"), "a name of query-stats"), pair.get("value")
        if isinstance(value, bool):
            values[name] = int(value)
        elif isinstance(value, int):  # the other values are histograms
            values[name] = expect_int(value, f"{name[:40]} of query-stats")
    return values
