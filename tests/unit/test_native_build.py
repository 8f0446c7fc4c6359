# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the helper has no dependencies and the extension needs only libc."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

import qemu_prefault
from qemu_prefault._native import __file__ as extension
from qemu_prefault._native import ffi, lib
from qemu_prefault.agents.base import Kind, Limits
from qemu_prefault.agents.control_page import CODE_SIZE, CONTROL_SIZE
from qemu_prefault.agents.ptrace import PtraceAgent
from qemu_prefault.host import kvm

NATIVE = Path(qemu_prefault.__file__).parent / "native"
BLOB = bytes(ffi.buffer(lib.helper_blob))

HELPER_FLAGS = re.findall(
    r'"(-[^"]+)"', (NATIVE / "build.py").read_text().split("HELPER_FLAGS = [")[1].split("]")[0]
)


def tool(name: str, *arguments: str | Path) -> str:
    """Run the compiler or a program from binutils, and return its output."""
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run([name, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the helper ---


def test_helper_fits_in_one_page() -> None:
    assert 0 < len(BLOB) <= 4096 == CODE_SIZE


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compile and link the helper as build.py does, and yield the directory."""
    directory = tmp_path_factory.mktemp("helper")
    source = NATIVE / "ptrace/helper.c"
    tool("cc", *HELPER_FLAGS, f"-I{NATIVE}", "-c", source, "-o", directory / "helper.o")
    script = ("-T", NATIVE / "ptrace/helper.lds", "--build-id=none")
    tool("ld", *script, "-o", directory / "helper.elf", directory / "helper.o")
    yield directory


def test_helper_has_no_external_symbols(compiled: Path) -> None:
    undefined = [
        line
        for line in tool("readelf", "-sW", compiled / "helper.elf").splitlines()
        if " UND " in line and not line.rstrip().endswith("UND")
    ]
    assert undefined == []
    assert "no relocations" in tool("readelf", "-rW", compiled / "helper.elf")
    sections = tool("readelf", "-SW", compiled / "helper.elf")
    for writable in (".data", ".bss", ".got"):
        assert f" {writable} " not in sections


def test_helper_uses_no_fpu_or_thread_pointer(compiled: Path) -> None:
    """Check that the helper's code uses neither the FPU nor thread-local storage."""
    code = tool("objdump", "-d", "--no-show-raw-insn", compiled / "helper.elf")
    assert "syscall" in code
    assert re.findall(r"%[xyz]mm\d+|%st\b|%[fg]s:|\bf(?:ld|st|xsave)\w*\b", code) == []


def test_helper_starts_with_its_entry(compiled: Path) -> None:
    header = tool("readelf", "-hW", compiled / "helper.elf")
    assert re.search(r"Entry point address:\s+0x0$", header, re.MULTILINE)


# --- shared structures ---

# The nested tests check the kernel's struct kvm_pre_fault_memory by calling the ioctl.
STRUCTS = {
    "struct prefault_range": (
        32,
        {"start": 0, "size": 8, "done": 16, "error": 24, "kind": 28},
    ),
    "struct prefault_control": (
        None,
        {
            # The assembly that runs in clone()'s child uses the first two offsets.
            "entry": 0,
            "stack_top": 8,
            "magic": 16,
        },
    ),
    "struct pagemap_region": (16, {"start": 0, "size": 8}),
    "struct inject_gadgets": (16, {"syscall_ret": 0, "sigreturn": 8}),
    "struct inject_result": (32, {"stage": 0, "error": 4, "held_ns": 8}),
}


@pytest.mark.parametrize("name", STRUCTS)
def test_struct_layouts_match(name: str) -> None:
    size, offsets = STRUCTS[name]
    assert size in (None, ffi.sizeof(name))
    for field, offset in offsets.items():
        assert ffi.offsetof(name, field) == offset, field


def test_single_writer_fields_are_aligned() -> None:
    control = ffi.typeof("struct prefault_control")
    for name, field in control.fields:
        assert field.offset % ffi.alignof(field.type) == 0, name
    assert ffi.offsetof("struct prefault_control", "ranges") % 8 == 0


def test_control_page_holds_a_full_batch() -> None:
    ranges = ffi.offsetof("struct prefault_control", "ranges")
    full = ranges + lib.PREFAULT_RANGES_MAX * ffi.sizeof("struct prefault_range")
    assert full <= ffi.sizeof("struct prefault_control") <= CONTROL_SIZE
    assert PtraceAgent.ranges_per_batch == lib.PREFAULT_RANGES_MAX


def test_python_and_c_constants_match() -> None:
    assert (Kind.POPULATE, Kind.STAGE2) == (lib.PREFAULT_POPULATE, lib.PREFAULT_STAGE2)
    assert (kvm.STUCK, kvm.ABORTED) == (lib.PREFAULT_STUCK, lib.PREFAULT_ABORTED)
    header = (NATIVE / "common/prefault_loop.h").read_text()
    assert "#define PREFAULT_IOCTL 0xC040AED5ul" in header
    # _IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory), 64 bytes: include/uapi/linux/kvm.h
    assert 3 << 30 | 64 << 16 | 0xAE << 8 | 0xD5 == 0xC040AED5


def test_helper_limits_are_ordered() -> None:
    limits = Limits()
    assert limits.tick < limits.stuck
    assert limits.tick * 5 <= limits.dead_man  # tolerates late ticks
    assert limits.chunk_bytes % (2 << 20) == 0


# --- the extension module ---


def test_extension_links_only_libc() -> None:
    dynamic = tool("readelf", "-dW", extension)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert needed <= {"libc.so.6", "ld-linux-x86-64.so.2", "libpthread.so.0"}
    assert "TEXTREL" not in dynamic


def test_extension_uses_stable_abi_and_exports_only_its_entry() -> None:
    assert extension.endswith(".abi3.so")
    symbols = tool("readelf", "-W", "--dyn-syms", extension).splitlines()
    exported = {line.split()[-1] for line in symbols if re.search(r"GLOBAL DEFAULT +\d", line)}
    assert {name for name in exported if "init" not in name.lower()} == set()


PLUGIN = Path(qemu_prefault.__file__).with_name("qemu-prefault-plugin.so")


@pytest.mark.parametrize("binary", [Path(extension), PLUGIN], ids=["extension", "plugin"])
def test_binaries_are_hardened(binary: Path) -> None:
    segments = tool("readelf", "-lW", binary)
    (stack,) = (line for line in segments.splitlines() if "GNU_STACK" in line)
    assert "RWE" not in stack
    assert "GNU_RELRO" in segments
    assert not re.search(r"LOAD .* RWE ", segments)
    dynamic = tool("readelf", "-dW", binary)
    assert re.search(r"\(FLAGS\).*BIND_NOW|\(FLAGS_1\).*NOW", dynamic)
    assert "TEXTREL" not in dynamic
    symbols = tool("readelf", "-W", "--dyn-syms", binary)
    assert "__stack_chk_fail" in symbols
    assert re.search(r"__\w+_chk@GLIBC", symbols), "_FORTIFY_SOURCE has no effect"
    # The linker marks the file only if libc's start files support CET, so look at the code.
    assert "endbr64" in tool("objdump", "-d", "--section=.text", binary)


@pytest.mark.parametrize(
    "name", sorted(str(path.relative_to(NATIVE)) for path in NATIVE.rglob("*.c"))
)
def test_c_code_compiles_without_warnings(name: str, tmp_path: Path) -> None:
    include = sysconfig.get_paths()["include"]
    flags = HELPER_FLAGS if name.endswith("helper.c") else ["-std=gnu11", "-O2", f"-I{include}"]
    strict = ["-Wall", "-Wextra", "-Wshadow", "-Wstrict-prototypes", "-Werror"]
    tool("cc", *flags, f"-I{NATIVE}", *strict, "-c", NATIVE / name, "-o", tmp_path / "object")


def test_stub_matches_extension() -> None:
    stub = (Path(qemu_prefault.__file__).parent / "_native.pyi").read_text()
    (declared,) = (
        node
        for node in ast.parse(stub).body
        if isinstance(node, ast.ClassDef) and node.name == "_Lib"
    )
    names = {
        node.name if isinstance(node, ast.FunctionDef) else ast.unparse(node.target)
        for node in declared.body
        if isinstance(node, (ast.FunctionDef, ast.AnnAssign))
    }
    assert names == set(dir(lib))
