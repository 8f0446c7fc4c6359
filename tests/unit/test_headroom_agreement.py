# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that Python and the C plugin compute the same headroom for QEMU's memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault._native import ffi, lib
from qemu_prefault.host import headroom, mapped_file, memory_source
from qemu_prefault.host.headroom import (
    cgroup_directories,
    cgroup_hugetlb_limit,
    hugetlb_pool_limit,
    memory_limit,
    parse_cgroups,
    parse_mountinfo,
)
from qemu_prefault.host.procfs import Process

MIB = 1 << 20
UNLIMITED = int(lib.HEADROOM_UNLIMITED)
V1_NONE = 0x7FFFFFFFFFFFF000  # LONG_MAX, rounded down to a page


@dataclass(frozen=True)
class Case:
    """The files of one cgroup, and the bytes available in this cgroup.

    If ``expected`` is None, the cgroup has no limit.
    """

    name: str
    expected: int | None
    files: Mapping[str, object] = field(default_factory=dict)
    unified: bool = True


MEMORY = (
    Case("v2 root has no limit", None, {"memory.stat": "inactive_file 5\n"}),
    Case("no limit set", None, {"memory.max": "max", "memory.high": "max", "memory.current": 7}),
    Case("max", 200, {"memory.max": 500, "memory.high": "max", "memory.current": 300}),
    Case("high is lower", 100, {"memory.max": 500, "memory.high": 400, "memory.current": 300}),
    Case("max is lower", 100, {"memory.max": 400, "memory.high": 500, "memory.current": 300}),
    Case("high alone", 100, {"memory.max": "max", "memory.high": 400, "memory.current": 300}),
    Case("high is absent", 100, {"memory.max": 400, "memory.current": 300}),
    Case("over the limit", 0, {"memory.max": 200, "memory.current": 300}),
    Case(
        "inactive page cache can be reclaimed",
        250,
        {
            "memory.max": 500,
            "memory.current": 300,
            "memory.stat": "anon 250\nactive_file 9\ninactive_file 50\nslab 3\n",
        },
    ),
    Case(
        "reclaimable cache above the limit",
        20,
        {"memory.max": 200, "memory.current": 300, "memory.stat": "inactive_file 120\n"},
    ),
    Case(
        "key must match completely",
        100,
        {
            "memory.max": 400,
            "memory.current": 300,
            "memory.stat": "total_inactive_file 5\ninactive_files 6\nworkingset inactive_file 7\n",
        },
    ),
    Case("usage is absent", None, {"memory.max": 500}),
    Case("usage is not a number", None, {"memory.max": 500, "memory.current": "12x"}),
    Case("limit is two numbers", None, {"memory.max": "500 1", "memory.current": 3}),
    Case(
        "v1",
        200,
        {"memory.limit_in_bytes": 500, "memory.usage_in_bytes": 300},
        unified=False,
    ),
    Case(
        "v1 without a limit",
        None,
        {"memory.limit_in_bytes": V1_NONE, "memory.usage_in_bytes": 300},
        unified=False,
    ),
    Case(
        "v1 counts the hierarchy's page cache",
        260,
        {
            "memory.limit_in_bytes": 500,
            "memory.usage_in_bytes": 300,
            "memory.stat": "cache 90\ninactive_file 1\ntotal_cache 90\ntotal_inactive_file 60\n",
        },
        unified=False,
    ),
    Case(
        "v1 limits memory and swap together",
        120,
        {
            "memory.limit_in_bytes": 500,
            "memory.usage_in_bytes": 200,
            "memory.memsw.limit_in_bytes": 500,
            "memory.memsw.usage_in_bytes": 400,
            "memory.stat": "total_inactive_file 20\n",
        },
        unified=False,
    ),
    Case(
        "v1 without a limit on swap",
        300,
        {
            "memory.limit_in_bytes": 500,
            "memory.usage_in_bytes": 200,
            "memory.memsw.limit_in_bytes": V1_NONE,
            "memory.memsw.usage_in_bytes": 900,
        },
        unified=False,
    ),
    Case(
        "v1 has no high",
        200,
        {"memory.limit_in_bytes": 500, "memory.high": 1, "memory.usage_in_bytes": 300},
        unified=False,
    ),
)
HUGETLB = (
    Case("no limit", None, {"hugetlb.2MB.max": "max", "hugetlb.2MB.current": 0}),
    Case("no such controller", None),
    Case("v2", 2 * MIB, {"hugetlb.2MB.max": 8 * MIB, "hugetlb.2MB.current": 6 * MIB}),
    Case("full", 0, {"hugetlb.2MB.max": 8 * MIB, "hugetlb.2MB.current": 9 * MIB}),
    Case("another size", None, {"hugetlb.1GB.max": 8 * MIB, "hugetlb.1GB.current": 6 * MIB}),
    Case(
        "v1",
        2 * MIB,
        {"hugetlb.2MB.limit_in_bytes": 8 * MIB, "hugetlb.2MB.usage_in_bytes": 6 * MIB},
        unified=False,
    ),
    Case(
        "v1 without a limit",
        None,
        {"hugetlb.2MB.limit_in_bytes": V1_NONE, "hugetlb.2MB.usage_in_bytes": 6 * MIB},
        unified=False,
    ),
)


def by_name(case: Case) -> str:
    return case.name


def write(directory: Path, files: Mapping[str, object]) -> None:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_text(f"{content}\n")


@contextmanager
def opened(path: str | Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def memory_in_c(directory: Path, unified: bool, least: int = UNLIMITED) -> int | None:
    group = ffi.new("struct headroom_group *", {"unified": unified})
    group.directory = os.fsencode(directory)
    fd = lib.pf_headroom_open_group(group)
    if fd < 0:
        return None
    left = lib.pf_headroom_group(fd, unified, least)
    os.close(fd)
    return None if left == UNLIMITED else left


@pytest.mark.parametrize("case", MEMORY, ids=by_name)
def test_memory_cgroup(case: Case, tmp_path: Path) -> None:
    write(tmp_path, case.files)
    limit = memory_limit(str(tmp_path), case.unified)
    assert (limit.available if limit else None) == case.expected
    assert memory_in_c(tmp_path, case.unified) == case.expected


@pytest.mark.parametrize("case", HUGETLB, ids=by_name)
def test_hugetlb_cgroup(case: Case, tmp_path: Path) -> None:
    write(tmp_path, case.files)
    limit = cgroup_hugetlb_limit(str(tmp_path), case.unified, 2 * MIB)
    assert (limit.available if limit else None) == case.expected
    with opened(tmp_path) as fd:
        left = lib.pf_headroom_hugetlb_group(fd, case.unified, 2 * MIB)
    assert (None if left == UNLIMITED else left) == case.expected


@pytest.mark.parametrize("page_size", [64 << 10, 2 * MIB, 512 * MIB, 1 << 30, 16 << 30])
def test_hugetlb_sizes_have_the_same_names(page_size: int, tmp_path: Path) -> None:
    for size in ("64KB", "2MB", "512MB", "1GB", "16GB"):
        limit = {f"hugetlb.{size}.max": 1 << 40 | len(size), f"hugetlb.{size}.current": 0}
        write(tmp_path, limit)
    found = cgroup_hugetlb_limit(str(tmp_path), True, page_size)
    assert found
    with opened(tmp_path) as fd:
        assert lib.pf_headroom_hugetlb_group(fd, True, page_size) == found.available


def test_least_of_several_is_kept(tmp_path: Path) -> None:
    """Check that the plugin returns the minimum of several limits.

    The plugin reads memory.stat only if the reclaimable cache can change the minimum.
    """
    write(tmp_path, {"memory.max": 500, "memory.current": 300, "memory.stat": "inactive_file 50"})
    assert memory_in_c(tmp_path, True, 1000) == 250
    assert memory_in_c(tmp_path, True, 250) == 250
    assert memory_in_c(tmp_path, True, 220) == 220
    assert memory_in_c(tmp_path, True, 100) == 100


@pytest.mark.parametrize("page_size", [2 * MIB, 1 << 30, 12345 << 10])
def test_hugetlb_pool_of_this_host(page_size: int) -> None:
    in_python = hugetlb_pool_limit(page_size, ours=1 << 62)
    path = "/sys/kernel/mm/hugepages"
    if not os.path.isdir(path):
        pytest.skip("this kernel has no huge pages")
    with opened(path) as fd:
        with opened("/proc/meminfo") as meminfo:
            host = lib.pf_headroom_host(meminfo)
        assert lib.pf_headroom_hugetlb_pool(fd, page_size, host) == in_python.available


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"free_hugepages": 7, "nr_overcommit_hugepages": 0, "surplus_hugepages": 0}, 7),
        ({"free_hugepages": 7, "nr_overcommit_hugepages": 5, "surplus_hugepages": 2}, 10),
        ({"free_hugepages": 7, "nr_overcommit_hugepages": 2, "surplus_hugepages": 5}, 7),
        ({"free_hugepages": 7, "nr_overcommit_hugepages": 99, "surplus_hugepages": 0}, 11),
        ({"free_hugepages": 7}, 7),
        ({}, 0),
    ],
)
def test_hugetlb_pool(files: dict[str, int], expected: int, tmp_path: Path) -> None:
    write(tmp_path / "hugepages-2048kB", files)
    with opened(tmp_path) as fd:
        assert lib.pf_headroom_hugetlb_pool(fd, 2 * MIB, 9 * MIB) == expected * 2 * MIB
        assert lib.pf_headroom_hugetlb_pool(fd, 1 << 30, 9 * MIB) == 0


def test_host(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       16 kB\nMemAvailable:    1000 kB\nBuffers: 3 kB\n")
    with opened(file) as fd:
        assert lib.pf_headroom_host(fd) == 1000 << 10
    file.write_text("MemTotal:       16 kB\n")
    with opened(file) as fd:
        assert lib.pf_headroom_host(fd) == UNLIMITED


@pytest.mark.parametrize(
    ("mode", "meminfo", "expected"),
    [
        ("2", "CommitLimit: 300 kB\nCommitted_AS:  100 kB\n", 200 << 10),
        ("2", "CommitLimit: 100 kB\nCommitted_AS:  300 kB\n", 0),
        ("1", "CommitLimit: 300 kB\nCommitted_AS:  100 kB\n", None),
        ("0", "CommitLimit: 300 kB\nCommitted_AS:  100 kB\n", None),
        ("2", "CommitLimit: 300 kB\n", None),
        ("2", "Committed_AS: 300 kB\n", None),
        ("x", "CommitLimit: 300 kB\nCommitted_AS:  100 kB\n", None),
    ],
)
def test_committed_memory(
    mode: str,
    meminfo: str,
    expected: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path, {"overcommit": mode, "meminfo": meminfo})
    monkeypatch.setattr(headroom, "OVERCOMMIT", str(tmp_path / "overcommit"))
    monkeypatch.setattr(headroom, "MEMINFO", str(tmp_path / "meminfo"))
    in_python = [limit.available for limit in headroom.commit_limit()]
    assert in_python == ([] if expected is None else [expected])
    with opened(tmp_path / "overcommit") as overcommit, opened(tmp_path / "meminfo") as file:
        left = lib.pf_headroom_commit(overcommit, file)
    assert (None if left == UNLIMITED else left) == expected


# --- NUMA nodes ---

KIB = 1 << 10
NODE = "Node {0} MemTotal: 9 kB\nNode {0} MemFree:  {1} kB\nNode {0} Inactive: 8 kB\n\
Node {0} Inactive(anon): 7 kB\nNode {0} Inactive(file):   {2} kB\nNode {0} HugePages_Free: 3\n"


def nodes_in_c(*numbers: int) -> Any:
    nodes = ffi.new("struct source_nodes *")
    for number in numbers:
        nodes.bits[number // 64] |= 1 << number % 64
    return nodes


def numbers(nodes: Any) -> tuple[int, ...]:
    return tuple(n for n in range(lib.SOURCE_NODES_MAX) if nodes.bits[n // 64] >> n % 64 & 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", (0,)),
        ("0\n", (0,)),
        ("0-2,5\n", (0, 1, 2, 5)),
        ("63-65,1023", (63, 64, 65, 1023)),
        ("", ()),
        ("\n", ()),
        ("1024", ()),
        ("0-", ()),
        ("0,", ()),
        ("0,x", ()),
        ("-1", ()),
        ("0 1", ()),
        ("3,1", ()),
        ("0-2,2", ()),
    ],
)
def test_node_lists(text: str, expected: tuple[int, ...]) -> None:
    nodes = ffi.new("struct source_nodes *")
    assert lib.pf_source_parse_nodes(text.encode(), nodes) == bool(expected)
    assert numbers(nodes) == expected
    assert memory_source.parse_node_list(text) == expected


@pytest.mark.parametrize(
    ("with_memory", "bound", "allowed", "expected"),
    [
        ((0,), (), (0,), ()),
        ((0, 1), (), (0, 1), ()),
        ((0, 1), (0, 1), (0, 1), ()),
        ((0, 1), (1,), (0, 1), (1,)),
        ((0, 1), (), (1,), (1,)),
        ((0, 1), (0, 1), (1,), (1,)),
        ((0, 1), (1,), (0,), (0,)),  # the cpuset's nodes: mpol_rebind_nodemask()
        ((0, 1), (1,), (), (1,)),  # the cpuset is unknown
        ((0, 2), (1,), (0, 1, 2), ()),  # the policy's node has no memory
        ((), (1,), (0, 1), ()),  # sysfs is not mounted
    ],
)
def test_confining_nodes(
    *,
    with_memory: tuple[int, ...],
    bound: tuple[int, ...],
    allowed: tuple[int, ...],
    expected: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path, {"has_memory": ",".join(map(str, with_memory))})
    (tmp_path / "1").mkdir()
    status = f"Mems_allowed_list:\t{','.join(map(str, allowed))}\n"
    write(tmp_path / "1", {"status": status if allowed else ""})
    monkeypatch.setattr(memory_source, "NODES", tmp_path)
    monkeypatch.setattr("qemu_prefault.host.proc_files.PROC", str(tmp_path))
    assert memory_source.confining_nodes(Process(1, 0), bound) == expected
    confined = ffi.new("struct source_nodes *")
    found = lib.pf_source_confine(
        nodes_in_c(*with_memory), nodes_in_c(*bound), nodes_in_c(*allowed), confined
    )
    assert found == bool(expected)
    assert not found or numbers(confined) == expected


@pytest.mark.parametrize(
    ("asked", "expected"), [((0,), 110), ((1,), 202), ((0, 1), 312), ((7,), 0), ((1, 7), 202)]
)
def test_node_meminfo(
    asked: tuple[int, ...], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node, free, inactive in ((0, 100, 10), (1, 200, 2)):
        write(tmp_path / f"node{node}", {"meminfo": NODE.format(node, free, inactive)})
    monkeypatch.setattr(memory_source, "NODES", tmp_path)
    # Do not subtract min_free_kbytes, which the C code subtracts in another function.
    monkeypatch.setattr(memory_source, "MIN_FREE", tmp_path / "missing")
    assert memory_source.node_limit(asked).available == expected * KIB
    with opened(tmp_path) as fd:
        assert lib.pf_source_nodes(fd, nodes_in_c(*asked)) == expected * KIB


@pytest.mark.parametrize(
    ("nodes", "reserved", "ours", "overcommit", "expected"),
    [
        ((), 0, 0, 0, 260),
        ((), 100, 0, 0, 160),
        ((), 100, 100, 0, 260),
        ((), 100, 30, 0, 190),
        ((), 0, 0, 5, 265),
        ((), 300, 0, 0, 0),
        ((0,), 0, 0, 0, 200),
        ((1,), 0, 0, 0, 60),
        ((0, 1), 0, 0, 0, 260),
        ((1,), 230, 0, 0, 30),
        ((1,), 230, 128, 0, 60),
        ((1,), 0, 0, 5, 60),  # the kernel may allocate surplus pages on any node
        ((3,), 0, 0, 0, 0),
    ],
)
def test_hugetlb_pools_of_nodes(
    *,
    nodes: tuple[int, ...],
    reserved: int,
    ours: int,
    overcommit: int,
    expected: int,
    tmp_path: Path,
) -> None:
    """Count the huge pages on node 0 (200 free) and node 1 (60 free)."""
    size = 2 * MIB
    pools, per_node = tmp_path / "hugepages", tmp_path / "node"
    files = {"free": 260, "resv": reserved, "nr_overcommit": overcommit, "surplus": 0}
    pools.mkdir()
    write(pools / "hugepages-2048kB", {f"{k}_hugepages": v for k, v in files.items()})
    for node, free in ((0, 200), (1, 60)):
        pool = per_node / f"node{node}" / "hugepages" / "hugepages-2048kB"
        pool.mkdir(parents=True)
        write(pool, {"free_hugepages": free})
    asked = nodes_in_c(*nodes) if nodes else ffi.NULL
    with opened(pools) as pools_fd, opened(per_node) as nodes_fd:
        left = lib.pf_source_hugetlb(pools_fd, nodes_fd, asked, size, ours * size, 1 << 60)
    assert left == expected * size


# --- cgroup directories ---

V2 = "30 25 0:26 / {cg} rw,nosuid shared:9 - cgroup2 cgroup2 rw\n"
V1 = "30 25 0:26 / {cg}/memory rw,nosuid shared:9 - cgroup cgroup rw,memory\n"
BOTH = V1 + "31 25 0:27 / {cg}/unified rw - cgroup2 cgroup2 rw\n"
PLACES = (
    ("v2", "0::/machine.slice/vm.scope\n", V2),
    ("v2, the root", "0::/\n", V2),
    ("v1", "9:name=systemd:/x\n4:cpu,memory:/machine/a b:c\n", V1),
    ("v1 beside v2", "4:cpu,memory:/machine/vm\n0::/vm\n", BOTH),
    ("v1, v2 without the controller", "4:cpu:/machine/vm\n0::/vm\n", BOTH),
    ("v2 listed first", "0::/vm\n4:memory:/machine/vm\n", BOTH),
    ("no hierarchy", "4:cpu:/x\n", V2),
    ("a container's part", "4:memory:/docker/1/vm\n", V1.replace(" / ", " /docker/1 ")),
    ("its root", "4:memory:/docker/1\n", V1.replace(" / ", " /docker/1 ")),
    ("another container's", "4:memory:/docker/12\n", V1.replace(" / ", " /docker/1 ")),
    ("outside the namespace", "0::/../../vm\n", V2),
    ("octal", "0::/vm\n", V2.replace("{cg}", "{cg}\\040x\\134")),
    ("not mounted", "0::/vm\n", "22 25 0:26 / /proc rw - proc proc rw\n"),
    ("several mounts", "0::/vm/a\n", V2.replace(" / ", " /other ") + V2),
    ("a broken line", "0::/vm/a\n", "22 25 0:26 / /proc\n1 2 - cgroup2\n" + V2),
    ("only part of an option", "4:memory:/vm\n", V1.replace("rw,memory", "rw,memorystat")),
)


@pytest.mark.parametrize(
    ("cgroup", "mountinfo"), [p[1:] for p in PLACES], ids=[p[0] for p in PLACES]
)
def test_directories(cgroup: str, mountinfo: str, tmp_path: Path) -> None:
    text = mountinfo.replace("{cg}", "/sys/fs/cgroup")
    in_python = cgroup_directories(parse_cgroups(cgroup), parse_mountinfo(text), "memory")
    assert directories_in_c(tmp_path, cgroup, text) == in_python


def test_directories_of_this_process(tmp_path: Path) -> None:
    cgroup, mountinfo = (Path(f"/proc/self/{name}").read_text() for name in ("cgroup", "mountinfo"))
    in_python = cgroup_directories(parse_cgroups(cgroup), parse_mountinfo(mountinfo), "memory")
    assert directories_in_c(tmp_path, cgroup, mountinfo) == in_python


INITIAL, NESTED = headroom.INITIAL_CGROUP_NAMESPACE, "cgroup:[4026532000]"
#: The name of a case, the text of /proc/PID/cgroup (None: absent), the text of mountinfo, the
#: cgroup namespace, the reason in Python (None: the limits are readable), and whether the plugin
#: can read the limits. In a cgroup namespace, the plugin does not rely on the namespace's root.
HIDDEN = (
    ("v2", "0::/vm\n", V2, INITIAL, None, True),
    ("v1", "4:memory:/vm\n", V1.replace("/memory", ""), INITIAL, None, True),
    ("root, not mounted", "0::/\n", "", INITIAL, None, True),
    ("no cgroups", None, "", INITIAL, None, True),
    ("not mounted", "0::/vm\n", "", INITIAL, "not mounted", False),
    ("v1, only v2 is mounted", "4:memory:/vm\n0::/vm\n", V2, INITIAL, "not mounted", False),
    ("outside the namespace", "0::/../vm\n", V2, NESTED, "outside", False),
    ("v1 outside the namespace", "4:memory:/../../vm\n", V1, NESTED, "outside", False),
    ("another container's", "0::/b\n", V2.replace(" / ", " /a "), INITIAL, "not mounted", False),
    ("covered mount", "0::/covered\n", V2, INITIAL, "is not a cgroup", True),
    ("missing directory", "0::/missing\n", V2, INITIAL, "No such file", False),
    ("host's mount", "0::/../vm\n", V2.replace(" / ", " /.. "), NESTED, None, False),
    ("root of a container", "0::/\n", V2, NESTED, None, False),
    ("root of a container, not mounted", "0::/\n", "", NESTED, "not mounted", False),
)


@pytest.mark.parametrize(
    ("cgroup", "mountinfo", "namespace", "reason", "in_c"),
    [case[1:] for case in HIDDEN],
    ids=[case[0] for case in HIDDEN],
)
def test_hidden_cgroups(
    *,
    cgroup: str | None,
    mountinfo: str,
    namespace: str,
    reason: str | None,
    in_c: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proc, groups = fake_proc(tmp_path, monkeypatch, cgroup, mountinfo, namespace)
    for name in ("", "vm", "covered"):
        write(groups / name, {} if name == "covered" else {"cgroup.procs": ""})
    found = headroom.hidden_cgroup(Process(1, 0), "memory")
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)
    names = ("1/cgroup", "self/mountinfo", "self/ns/cgroup")
    first, second, third = (os.fsencode(proc / name) for name in names)
    assert bool(lib.pf_headroom_sees_group(first, second, third, b"memory")) == in_c


def fake_proc(
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    cgroup: str | None,
    mountinfo: str,
    namespace: str = INITIAL,
) -> tuple[Path, Path]:
    """Create a /proc with the process 1, and return it and the directory for cgroups."""
    proc, groups = scratch / "proc", scratch / "cg"
    for directory in (proc / "self/ns", proc / "1"):
        directory.mkdir(parents=True)
    (proc / "self/ns/cgroup").symlink_to(namespace)
    write(proc / "self", {"mountinfo": mountinfo.replace("{cg}", str(groups))})
    write(proc, {"cgroups": "#name hierarchy num_cgroups enabled\nmemory\t0\t9\t1\npids 0 9 0"})
    if cgroup is not None:
        (proc / "1/cgroup").write_text(cgroup)
    monkeypatch.setattr("qemu_prefault.host.proc_files.PROC", str(proc))
    return proc, groups


def test_absent_controller_has_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc, _ = fake_proc(tmp_path, monkeypatch, "0::/vm\n", "")
    process = Process(1, 0)
    assert headroom.hidden_cgroup(process, "memory")
    assert headroom.hidden_cgroup(process, "pids") is None  # disabled
    assert headroom.hidden_cgroup(process, "hugetlb") is None  # not in the kernel
    (proc / "cgroups").write_text("pids 0 9 1\n")
    assert headroom.hidden_cgroup(process, "memory") is None
    (proc / "kpagecgroup").touch()  # CONFIG_MEMCG without CONFIG_MEMCG_V1
    assert headroom.hidden_cgroup(process, "memory")


def test_hidden_cgroup_leaves_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc, _ = fake_proc(tmp_path, monkeypatch, "0::/../vm\n", V2, NESTED)
    write(proc, {"meminfo": "MemAvailable: 1000 kB"})
    host, group = headroom.memory_headroom(Process(1, 0))
    assert (host.available, host.unknown) == (1000 << 10, "")
    assert group.available == 0 and "cannot be read" in group.unknown
    assert "outside" in group.detail


def directories_in_c(scratch: Path, cgroup: str, mountinfo: str) -> list[tuple[str, bool]]:
    files = (scratch / "cgroup", scratch / "mountinfo")
    for file, text in zip(files, (cgroup, mountinfo), strict=True):
        file.write_text(text)
    group = ffi.new("struct headroom_group *")
    paths = (os.fsencode(files[0]), os.fsencode(files[1]))
    found = []
    more = lib.pf_headroom_find_group(paths[0], paths[1], b"memory", group)
    while more:
        found.append((ffi.string(group.directory).decode(), bool(group.unified)))
        more = lib.pf_headroom_parent(group)
    return found


@pytest.mark.parametrize("major", [0, 8])
@pytest.mark.parametrize(
    "kind",
    [
        *(0x9123683E, 0xCA451A4E, 0x2FC12FC1, 0x6969, 0x01021997, 0x00C36400, 0xFF534D42),
        *(0xFE534D42, 0xEF53, 0x58465342, 0x794C7630, 0xF15F, 0x12345678),
    ],
)
def test_same_file_systems_may_be_in_memory(kind: int, major: int) -> None:
    may_be_in_memory = mapped_file.kind_of_type(kind, major) is not mapped_file.FileKind.DISK
    assert lib.pf_source_is_stacked(kind, os.makedev(major, 40)) == may_be_in_memory
