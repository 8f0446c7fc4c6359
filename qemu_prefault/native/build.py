# SPDX-License-Identifier: GPL-2.0-or-later
"""Build ``qemu_prefault._native``.

The extension module contains the C functions, and the helper's machine code as an array. This
script links the helper separately at address 0 with ``helper.lds``. The linker fails if the code
needs writable data or does not fit in one page.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FLAGS = runpy.run_path(str(HERE / "flags.py"))

SOURCES = (
    *("common/headroom.c", "common/limits.c", "common/memory_source.c", "common/pagemap.c"),
    "conformance/vmm.c",
    "host/file_info.c",
    *("ptrace/tracee.c", "ptrace/filters.c", "ptrace/inject.c", "ptrace/run_gate.c"),
)

#: Compiler flags of the helper. They prevent the use of FPU registers. They also prevent the
#: optimizer from replacing loops with calls to libc functions such as memset().
HELPER_FLAGS = [
    *("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror"),
    *("-ffreestanding", "-fno-builtin", "-fPIE", "-fno-stack-protector"),
    *("-fcf-protection=none", "-fno-asynchronous-unwind-tables", "-fno-jump-tables"),
    *("-mgeneral-regs-only", "-fno-tree-loop-distribute-patterns", "-U_FORTIFY_SOURCE"),
]


def compile_helper() -> bytes:
    """Return the helper's position-independent code, whose entry point is byte 0."""
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
    """Write ``helper_blob.h``, which defines the helper's machine code as an array."""
    code = compile_helper()
    rows = (code[at : at + 16] for at in range(0, len(code), 16))
    lines = (", ".join(f"0x{byte:02x}" for byte in row) for row in rows)
    (HERE / "helper_blob.h").write_text(
        f"static const unsigned char helper_blob[{len(code)}] = {{\n"
        + "".join(f"\t{line},\n" for line in lines)
        + "};\n"
    )


#: The headers whose declarations are available in Python. They may contain only types, prototypes
#: and integer macros, because cffi parses them.
SHARED_HEADERS = (
    "common/headroom.h",
    "common/limits.h",
    "common/memory_source.h",
    "common/pagemap.h",
    "common/prefault_range.h",
    "conformance/vmm.h",
    "host/file_info.h",
    "ptrace/control_page.h",
    "ptrace/inject_result.h",
    "ptrace/target.h",
    "ptrace/filters.h",
    "ptrace/inject.h",
    "ptrace/run_gate.h",
)
LITERAL = re.compile(r"0x[0-9a-f]+[ul]*|[0-9]+", re.IGNORECASE)


def declarations(header: str) -> str:
    """Return the declarations and the integer macros of a header, without comments."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", (HERE / header).read_text(), flags=re.DOTALL)
    lines = []
    for line in text.splitlines():
        if macro := re.match(r"#define (\w+)\s+(\S.*?)\s*$", line):
            value = macro[2] if LITERAL.fullmatch(macro[2]) else "..."  # the compiler evaluates it
            lines.append(f"#define {macro[1]} {value}")
        elif not line.startswith("#"):
            lines.append(line)
    return "\n".join(lines)


CDEF = "\n".join(declarations(header) for header in SHARED_HEADERS)
CDEF += """
static const unsigned char helper_blob[...];
#define PREFAULT_IOCTL ...
int kvm_check_extension(int32_t kvm_fd, int32_t extension);
int kvm_pre_fault(int32_t vcpu_fd, uint64_t gpa, uint64_t size);
int take_fd(int32_t pidfd, int32_t number);
int open_in_root(int32_t root, const char *path);
int open_in_mount(int32_t directory, const char *name);
int send_signal(int32_t pid, int32_t tid, int32_t number);
"""

INCLUDES = "\n".join(f'#include "{header}"' for header in SHARED_HEADERS)
SOURCE = f"""
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/openat2.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "common/prefault_loop.h"
#include "helper_blob.h"
{INCLUDES}
"""
SOURCE += """

/* Issue KVM_CHECK_EXTENSION. Returns its result or a negative errno. */
static int kvm_check_extension(int32_t kvm_fd, int32_t extension)
{
	int answer = ioctl(kvm_fd, KVM_CHECK_EXTENSION, extension);

	return answer < 0 ? -errno : answer;
}

/* Issue one KVM_PRE_FAULT_MEMORY from this process. Returns 0 or a negative errno. */
static int kvm_pre_fault(int32_t vcpu_fd, uint64_t gpa, uint64_t size)
{
	struct kvm_pre_fault_memory_args args = { .gpa = gpa, .size = size };

	return ioctl(vcpu_fd, PREFAULT_IOCTL, &args) < 0 ? -errno : 0;
}

/*
 * Call pidfd_getfd(2). Python has no wrapper for this call, and glibc has had one only since 2.36.
 * Returns a descriptor or -errno.
 */
static int take_fd(int32_t pidfd, int32_t number)
{
	long fd = syscall(SYS_pidfd_getfd, pidfd, number, 0);

	return fd < 0 ? -errno : (int)fd;
}

/*
 * Open a path with O_PATH and openat2(2), for which libc has no wrapper. Symbolic links and ".."
 * cannot leave the directory root. Returns a descriptor or -errno.
 */
static int open_in_root(int32_t root, const char *path)
{
	struct open_how how = { .flags = O_PATH | O_CLOEXEC,
				.resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS };
	long fd = syscall(SYS_openat2, root, path, &how, sizeof(how));

	return fd < 0 ? -errno : (int)fd;
}

/*
 * Open an entry of a directory with O_PATH. Does not follow a link, and does not enter a mount, so
 * that no server of a file system can block the caller. Returns a descriptor or -errno.
 */
static int open_in_mount(int32_t directory, const char *name)
{
	struct open_how how = { .flags = O_PATH | O_NOFOLLOW | O_CLOEXEC,
				.resolve = RESOLVE_BENEATH | RESOLVE_NO_XDEV };
	long fd = syscall(SYS_openat2, directory, name, &how, sizeof(how));

	return fd < 0 ? -errno : (int)fd;
}

/* Call tgkill(2). Returns 0 or a negative errno. */
static int send_signal(int32_t pid, int32_t tid, int32_t number)
{
	return syscall(SYS_tgkill, pid, tid, number) < 0 ? -errno : 0;
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
    extra_compile_args=FLAGS["COMPILE_FLAGS"],
    extra_link_args=FLAGS["LINK_FLAGS"],
)
