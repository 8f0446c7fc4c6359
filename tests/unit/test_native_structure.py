# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the layers of the C files, based on their includes and symbols."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import qemu_prefault

NATIVE = Path(qemu_prefault.__file__).parent / "native"

# The lowest layer is first. Each file may include and call only the files before it. plugin/state.h
# describes each of the plugin's files.
COMMON = ("common/headroom", "common/limits", "common/memory_source", "common/pagemap")
PLUGIN = tuple(
    f"plugin/{name}"
    for name in (
        *("os", "pace", "options", "limits", "errors", "state", "messages", "event_log"),
        "guest_ranges",
        *("host_ranges", "headroom", "quirk", "prefault_vcpu", "firmware", "queue", "memslots"),
        *("qemu_memory", "claims", "chunk", "guest_start", "prefault_thread", "vcpu"),
        *("batch", "watchdog", "status", "commands", "clients", "control_socket", "vm", "got"),
        *("interpose", "main"),
    )
)
HEADERS_ONLY = ("common/syscall_x86_64", "common/prefault_range", "common/prefault_loop")
PTRACE = (
    *("ptrace/control_page", "ptrace/arch_x86_64", "ptrace/inject_result", "ptrace/target"),
    *(
        "ptrace/tracee",
        "ptrace/filters",
        "ptrace/inject",
        "ptrace/run_gate",
        "ptrace/helper_x86_64",
    ),
)
ORDER = (
    *(*HEADERS_ONLY, *COMMON, *PLUGIN, *PTRACE, "ptrace/helper"),
    *("conformance/vmm", "host/file_info"),
)

#: The libc functions that the plugin interposes.
INTERPOSED = frozenset({"ioctl", "madvise", "fallocate", "fallocate64", "mmap", "mmap64"})
#: Files whose code runs with pf_lock held. This code must not allocate memory, because another
#: thread may wait for pf_lock in a hook while it holds the allocator's locks.
UNDER_LOCK = tuple(
    f"plugin/{name}"
    for name in (
        *("state", "event_log", "quirk", "prefault_vcpu", "firmware", "queue", "memslots"),
        *("qemu_memory", "claims", "chunk", "guest_start", "prefault_thread", "vcpu"),
        "watchdog",
    )
)
ALLOCATING = frozenset(
    {
        *("malloc", "calloc", "realloc", "free", "strdup", "asprintf", "pthread_create"),
        *("fopen", "fopen64", "fdopen", "getline", "getdelim", "fprintf", "__fprintf_chk"),
        *("fputs", "fwrite", "fflush", "puts", "printf", "__printf_chk", "opendir"),
    }
)
ENTRIES = frozenset({"qemu_plugin_install", "qemu_plugin_version"})
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden")

needs_tools = pytest.mark.skipif(
    shutil.which("cc") is None or shutil.which("nm") is None,
    reason="a C compiler or binutils is not installed",
)


@dataclass(frozen=True)
class Object:
    """The defined and undefined symbols of one compiled file."""

    defined: frozenset[str]
    undefined: frozenset[str]


def symbols(path: Path, *options: str) -> frozenset[str]:
    done = subprocess.run(
        ["nm", "--format=posix", *options, path], capture_output=True, text=True, check=True
    )
    return frozenset(line.split()[0].partition("@")[0] for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Object]:
    """Compile each C file with the plugin's flags, and return its symbols."""
    directory = tmp_path_factory.mktemp("objects")
    found = {}
    for name in ORDER:
        source = NATIVE / f"{name}.c"
        if not source.exists():
            continue  # a header without a source file
        path = directory / f"{name.replace('/', '-')}.o"
        subprocess.run(["cc", *FLAGS, f"-I{NATIVE}", "-c", source, "-o", path], check=True)
        found[name] = Object(
            symbols(path, "--extern-only", "--defined-only"), symbols(path, "--undefined-only")
        )
    return found


@pytest.fixture(scope="module")
def plugin(objects: Mapping[str, Object]) -> Path:
    """Return the installed plugin."""
    path = NATIVE.parent / "qemu-prefault-plugin.so"
    if not path.exists():
        pytest.skip("this installation has no plugin")
    return path


def test_every_file_has_a_layer() -> None:
    found = {
        str(path.relative_to(NATIVE).with_suffix(""))
        for path in NATIVE.rglob("*.[ch]")
        if path.name != "helper_blob.h"
    }
    assert found == set(ORDER)


def test_order_matches_documentation() -> None:
    text = (NATIVE / "plugin/state.h").read_text()
    documented = re.findall(r"^ \*   (\w+)  +\S", text, re.MULTILINE)
    assert tuple(f"plugin/{name}" for name in documented) == PLUGIN


@pytest.mark.parametrize("name", ORDER)
def test_includes_point_down(name: str) -> None:
    for suffix in (".h", ".c"):
        path = NATIVE / f"{name}{suffix}"
        text = path.read_text() if path.exists() else ""
        for included in re.findall(r'^#include "(.*)\.h"', text, re.MULTILINE):
            beside = path.parent / f"{included}.h"
            target = str(beside if beside.exists() else NATIVE / f"{included}.h")
            used = str(Path(target).relative_to(NATIVE).with_suffix(""))
            assert ORDER.index(used) <= ORDER.index(name), f"{path} includes {used}.h"


def test_state_is_changed_only_by_documented_files() -> None:
    text = (NATIVE / "plugin/state.h").read_text()
    owners = {}
    for comment, block in re.findall(r"/\* Changed by: (.*?) \*/\n(.*?)\n\n", text, re.DOTALL):
        for name in re.findall(r"^extern [^;]*?(\w+)(?:\[\w*\])?;", block, re.MULTILINE):
            owners[name] = set(re.findall(r"\w+\.c", comment))
    defined = re.findall(r"^extern [^;{]*?(\w+)(?:\[\w*\])?;", text, re.MULTILINE)
    assert set(defined) - set(owners) == {"pf_lock", "pf_changed"}
    found: dict[str, set[str]] = {name: set() for name in owners}
    for path in NATIVE.glob("plugin/*.c"):
        code = path.read_text()
        for name in owners:
            written = (
                rf"(?<![*\w] ){name}\s*(?:[-+|&]?=(?!=)|\+\+|--)|--{name}|\+\+{name}"
                rf"|= {name} = |atomic_(?:store|fetch_\w+|exchange)\(&{name}\b"
                rf"|pf_grow\(\(void \*\*\)&{name}\b"
            )
            if re.search(written, code) and path.name != "state.c":
                found[name].add(path.name)
    for name, files in found.items():
        assert files <= owners[name], name
    written_somewhere = {name for name, files in found.items() if files}
    assert {"pf_vm_fd", "pf_memslots", "pf_queue", "pf_in_flight"} <= written_somewhere


@needs_tools
@pytest.mark.parametrize("name", [n for n in ORDER if n not in HEADERS_ONLY])
def test_calls_point_down(objects: Mapping[str, Object], name: str) -> None:
    if name not in objects:
        pytest.skip("this header has no source file")
    below = ORDER[: ORDER.index(name)]
    reachable = {s for n in below if n in objects for s in objects[n].defined}
    used = {symbol for symbol in objects[name].undefined if symbol.startswith("pf_")}
    assert used - reachable == set()


@needs_tools
def test_external_symbols_have_prefix(objects: Mapping[str, Object]) -> None:
    """Check that external symbols have a prefix, to not clash with QEMU's."""
    for name, found in objects.items():
        allowed = {"plugin/interpose": INTERPOSED, "plugin/main": ENTRIES}.get(name, frozenset())
        strange = {s for s in found.defined if not s.startswith("pf_")}
        assert strange == allowed, name


@needs_tools
def test_symbols_are_defined_once(objects: Mapping[str, Object]) -> None:
    every = [symbol for found in objects.values() for symbol in found.defined]
    assert len(every) == len(set(every))


@needs_tools
def test_interposed_functions_are_not_called_by_name(objects: Mapping[str, Object]) -> None:
    """Check that no file calls an interposed function by its name.

    Whether such a call reached libc's function or the plugin's function would depend on how the
    plugin is loaded.
    """
    for name in (*COMMON, *PLUGIN):
        if name in objects:
            assert objects[name].undefined & INTERPOSED == frozenset(), name


@needs_tools
@pytest.mark.parametrize("name", UNDER_LOCK)
def test_no_allocation_with_pf_lock_held(objects: Mapping[str, Object], name: str) -> None:
    assert objects[name].undefined & ALLOCATING == frozenset()


@needs_tools
def test_plugin_exports_only_its_entries(plugin: Path) -> None:
    assert symbols(plugin, "--dynamic", "--defined-only") == INTERPOSED | ENTRIES


@needs_tools
def test_plugin_binds_no_interposed_function(plugin: Path) -> None:
    """Check that the plugin refers to no function that it interposes."""
    assert symbols(plugin, "--dynamic", "--undefined-only") & INTERPOSED == frozenset()
    done = subprocess.run(
        ["readelf", "--relocs", "--wide", plugin], capture_output=True, text=True, check=True
    )
    named = set(re.findall(r"R_X86_64_\w+\s+[0-9a-f]+\s+([\w]+)", done.stdout))
    assert "syscall" in named  # the plugin calls syscall() instead
    assert named & INTERPOSED == set()


@needs_tools
def test_plugin_consists_of_listed_files(plugin: Path, objects: Mapping[str, Object]) -> None:
    needed = {s for n in (*COMMON, *PLUGIN) if n in objects for s in objects[n].undefined}
    defined = {s for n in (*COMMON, *PLUGIN) if n in objects for s in objects[n].defined}
    assert {s for s in needed if s.startswith("pf_")} <= defined
    assert symbols(plugin, "--dynamic", "--defined-only") <= defined


@pytest.mark.parametrize("path", sorted(NATIVE.rglob("*.[ch]")), ids=lambda path: path.name)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
