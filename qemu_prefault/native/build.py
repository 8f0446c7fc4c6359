# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds ``qemu_prefault._native``: the C parts, and the helper's code as bytes in it.

The helper is linked by itself at address 0 with ``helper.lds``, which refuses anything
that would need relocation or writable data, and lands in the extension as an array.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

SOURCES = ("common/pagemap.c", "conformance/vmm.c", "ptrace/inject.c")

# The helper has no libc, must not touch FPU state, and must not be given calls to
# memset() by an optimizer that recognises loops.
HELPER_FLAGS = [
    *("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror"),
    *("-ffreestanding", "-fno-builtin", "-fPIE", "-fno-stack-protector"),
    *("-fcf-protection=none", "-fno-asynchronous-unwind-tables", "-fno-jump-tables"),
    *("-mgeneral-regs-only", "-fno-tree-loop-distribute-patterns", "-U_FORTIFY_SOURCE"),
]


def compile_helper() -> bytes:
    """The helper's machine code: position independent, entry at byte 0."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]
    with tempfile.TemporaryDirectory() as scratch:
        obj, elf, image = (Path(scratch) / name for name in ("helper.o", "helper.elf", "image"))
        commands: list[list[str | Path]] = [
            [*compiler, *HELPER_FLAGS, f"-I{HERE}", "-c", HERE / "ptrace/helper.c", "-o", obj],
            ["ld", "-T", HERE / "ptrace/helper.lds", "--build-id=none", "-o", elf, obj],
            ["objcopy", "-O", "binary", "-j", ".image", elf, image],
        ]
        for command in commands:
            subprocess.run(command, check=True)
        return image.read_bytes()


def write_helper_header() -> None:
    code = compile_helper()
    rows = (code[at : at + 16] for at in range(0, len(code), 16))
    lines = (", ".join(f"0x{byte:02x}" for byte in row) for row in rows)
    (HERE / "helper_blob.h").write_text(
        f"static const unsigned char helper_blob[{len(code)}] = {{\n"
        + "".join(f"\t{line},\n" for line in lines)
        + "};\n"
    )


CDEF = """
enum prefault_kind { PREFAULT_POPULATE, PREFAULT_STAGE2 };
struct prefault_range { uint64_t start, size, done; int32_t error; uint32_t kind; };
struct prefault_limits { uint64_t chunk_bytes, stuck_ns; };
struct prefault_control {
    uint64_t entry, stack_top, magic, area_start, area_size;
    uint64_t syscall_ret, sigreturn, exit_slot, dead_man_ns, tick_ns, kick_ns;
    struct prefault_limits limits;
    int32_t vcpu_fd, vcpu_tid, kick_signal, tool_pid;
    uint64_t heartbeat;
    uint32_t batch, abort, release, range_count;
    uint32_t tid, ready, batch_done, leaving;
    uint64_t batch_started_ns, chunk_started_ns, batch_finished_ns;
    struct prefault_range ranges[...];
    ...;
};
#define PREFAULT_CONTROL_MAGIC ...
#define PREFAULT_RANGES_MAX ...
#define PREFAULT_STUCK ...
#define PREFAULT_ABORTED ...
static const unsigned char helper_blob[...];

enum inject_stage { INJECT_OK, INJECT_SEIZE, INJECT_STOP, INJECT_INSPECT, INJECT_WRITE,
    INJECT_RESUME, INJECT_MMAP, INJECT_COPY, INJECT_PROTECT, INJECT_CLONE, ... };
struct inject_gadgets { uint64_t syscall_ret, sigreturn; };
struct inject_result { int32_t stage, error; uint64_t held_ns; };
int pf_inject_probe(int32_t pid, int32_t tid, int32_t mem_fd, const struct inject_gadgets *gadgets,
    uint64_t area, struct inject_result *result);
int pf_inject_helper(int32_t pid, int32_t tid, int32_t own_pid, int32_t mem_fd,
    const struct inject_gadgets *gadgets, uint64_t area, uint64_t area_size, const void *image,
    uint64_t image_size, uint64_t code_size, struct inject_result *result);

struct pagemap_region { uint64_t start, size; };
long pf_pagemap_writable(int32_t fd, uint64_t start, uint64_t end, int32_t is_private,
    struct pagemap_region *regions, size_t count, uint64_t *next);
long pf_pagemap_sum(int32_t fd, uint64_t start, uint64_t end, int32_t is_private,
    uint64_t *present, uint64_t *writable);
int pf_pagemap_sees_zero_page(int32_t fd);

int kvm_check_extension(int32_t kvm_fd, int32_t extension);
int kvm_pre_fault(int32_t vcpu_fd, uint64_t gpa, uint64_t size);
int take_fd(int32_t pidfd, int32_t number);

int pf_vmm_init(void);
int pf_vmm_signal(void);
long pf_vmm_ioctl(int32_t fd, uint64_t request, uint64_t argument);
long pf_vmm_ioctl_limited(int32_t fd, uint64_t request, uint64_t argument, uint64_t limit_ns);
long pf_vmm_ioctl_in_clone(int32_t fd, uint64_t request, uint64_t argument);
long pf_vmm_syscall(long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e,
    uint64_t f);
"""

SOURCE = """
#include <errno.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "common/pagemap.h"
#include "conformance/vmm.h"
#include "ptrace/control_page.h"
#include "ptrace/inject.h"
#include "helper_blob.h"

/* KVM_CHECK_EXTENSION: a non-negative answer, or a negative errno. */
static int kvm_check_extension(int32_t kvm_fd, int32_t extension)
{
	int answer = ioctl(kvm_fd, KVM_CHECK_EXTENSION, extension);

	return answer < 0 ? -errno : answer;
}

/* One KVM_PRE_FAULT_MEMORY, asked by this process itself: 0, or a negative errno. */
static int kvm_pre_fault(int32_t vcpu_fd, uint64_t gpa, uint64_t size)
{
	struct kvm_pre_fault_memory_args args = { .gpa = gpa, .size = size };

	return ioctl(vcpu_fd, PREFAULT_IOCTL, &args) < 0 ? -errno : 0;
}

/* pidfd_getfd(2), which neither Python nor a glibc before 2.36 has: a descriptor, or -errno. */
static int take_fd(int32_t pidfd, int32_t number)
{
	long fd = syscall(SYS_pidfd_getfd, pidfd, number, 0);

	return fd < 0 ? -errno : (int)fd;
}
"""

write_helper_header()
ffibuilder = FFI()
ffibuilder.cdef(CDEF)
ffibuilder.set_source(
    "qemu_prefault._native",
    SOURCE,
    sources=[os.path.relpath(HERE / name, ROOT) for name in SOURCES],
    include_dirs=[os.path.relpath(HERE, ROOT)],
    depends=[os.path.relpath(path, ROOT) for path in HERE.rglob("*.[hc]")],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
)
