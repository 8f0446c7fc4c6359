# SPDX-License-Identifier: GPL-2.0-or-later
"""The files from which the lab boots, and the QEMU that runs on L0.

The files are Debian root file systems, kernels and initramfs. mmdebstrap creates a tar file, and
``mke2fs -d`` creates an ext4 image from the tar file. The lab mounts no file system. If the user is
not root, both programs run in a user namespace.

QEMU boots the ELF file from a kernel's bzImage through the PVH entry point, because running the
bzImage's decompressor under TCG adds seconds to every cold boot.
"""

from __future__ import annotations

import json
import logging
import lzma
import os
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qemu_prefault.errors import InputError

from . import cache
from .errors import ImageError
from .steps import need, run_step

log = logging.getLogger(__name__)

_HERE = Path(__file__).parent
APT_OPTIONS = ('Acquire::Retries "3"', 'APT::Install-Recommends "false"')
#: The suites whose Release file expires after a week. A mirror or proxy that updates less often
#: serves an expired file. apt always checks the signature.
EXPIRING_SUITES = ("sid", "testing")
WITHOUT = (
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/usr/share/lintian/*",
    "/usr/share/qemu/hppa-firmware*",
    "/usr/share/qemu/openbios-*",
    "/usr/share/qemu/skiboot.lid",
    "/usr/bin/qemu-system-i386",
)
_L1_PACKAGES = (
    "iproute2",
    "kmod",
    "ovmf",
    "procps",
    "python3",
    "python3-cffi-backend",
    "python3-click",
    "python3-pytest",
    "qemu-system-x86",
    "seabios",
)
# Packages that avocado-vt's bootstrap requires or that the tests use to create disks.
_AVOCADO_PACKAGES = (
    "diffutils",
    "gcc",
    "git",
    "iputils-arping",
    "netcat-openbsd",
    "qemu-utils",
    "tcpdump",
    "xz-utils",
)
_ALLOCATOR_PACKAGES = ("libjemalloc2", "libmimalloc3", "libtcmalloc-minimal4t64")
_LIBVIRT_PACKAGES = (
    "apparmor",
    "libvirt-clients",
    "libvirt-daemon-driver-qemu",
    "libvirt-daemon-system",
    "python3-libvirt",
    "python3-prometheus-client",
    "systemd",
)
# Modules needed to mount the root file system. Modules built into the kernel are skipped.
_BOOT_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "ext4", "overlay")
OPTIONAL_BOOT_MODULES = ("crc32c_generic", "crc32c_intel", "crc32c")
# Modules that an L2 guest loads on request, in this order, for a balloon or virtio-mem device.
L2_MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev",
               "virtio_pci", "virtio_balloon", "virtio_mem")  # fmt: skip
# Modules that an L2 guest needs to run KVM.
_L2_KVM_MODULES = ("irqbypass", "kvm", "kvm-amd")
# Driver directories that a lab may need. The other drivers in a kernel package are for hardware
# that the lab's QEMUs do not emulate.
KEPT_DRIVERS = ("block/", "char/", "crypto/", "dax/", "net/tap", "net/tun", "nvdimm/", "vfio/",
                 "vhost/", "virtio/")  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A Debian release for L1, with its suites in the order in which they are tried."""

    name: str
    suites: tuple[str, ...]
    packages: tuple[str, ...] = _L1_PACKAGES
    kernel: str = "linux-image-cloud-amd64"


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("bookworm", ("bookworm",)),  # kernel 6.1 (without the ioctl), QEMU 7.2
        # Kernel 6.12 and QEMU 10.0. The soak preloads the allocators into QEMU.
        Variant("trixie", ("trixie",), (*_L1_PACKAGES, *_ALLOCATOR_PACKAGES)),
        Variant("libvirt", ("trixie",), (*_L1_PACKAGES, *_LIBVIRT_PACKAGES)),  # libvirt 11.3
        # sid's package index is sometimes newer than the pool, so that downloads fail. Retry.
        Variant("sid", ("sid", "sid", "testing")),
        # Trixie with the packages that the tests in avocado/ need.
        Variant("avocado", ("trixie",), (*_L1_PACKAGES, *_AVOCADO_PACKAGES)),
    )
}


def variant_named(name: str) -> Variant:
    """Return the variant with this name."""
    try:
        return VARIANTS[name]
    except KeyError:
        raise InputError(f"no lab variant {name!r}", f"choose from {', '.join(VARIANTS)}") from None


@dataclass(frozen=True)
class TcgHost:
    """QEMU 7.2 and a few tools from Debian 12, with their own loader and libraries.

    The lab emulates L1 with this QEMU, because QEMU 9.1 and later cannot run an L2 guest with
    shadow paging. Since QEMU 9.1, TCG does not intercept reads of CR2, CR3 and CR4 in SVM guests,
    so an L2 guest with shadow paging triple-faults. The cause is in
    target/i386/tcg/decode-new.c.inc: X86_TYPE_C tests whether ``intercept`` is
    non-zero, but SVM_EXIT_READ_CR0 is 0.
    """

    directory: Path

    def command(self, tool: str, *arguments: str) -> list[str]:
        """Return the argument list that runs a tool from this tree."""
        libraries = self.directory / "usr/lib/x86_64-linux-gnu"
        search = (self.directory / "lib/x86_64-linux-gnu", libraries, libraries / "pulseaudio")
        modules = libraries / "qemu"
        loader = self.directory / "lib64/ld-linux-x86-64.so.2"
        path = ":".join(str(directory) for directory in search)
        return [
            "env",
            f"QEMU_MODULE_DIR={modules}",
            str(loader),
            "--library-path",
            path,
            str(self.directory / "usr/bin" / tool),
            *arguments,
        ]

    def qemu(self, *arguments: str, binary: Path | None = None) -> list[str]:
        """Return arguments that run QEMU, or ``binary``, with this tree's firmware."""
        share = self.directory / "usr/share"
        words = ["-L", f"{share}/qemu", "-L", f"{share}/seabios", *arguments]
        return [str(binary), *words] if binary else self.command("qemu-system-x86_64", *words)


@dataclass(frozen=True)
class Image:
    """A directory with the built image of a variant."""

    directory: Path
    suite: str
    kernel_release: str

    @property
    def rootfs(self) -> Path:
        """The raw ext4 root file system, to which L1 never writes."""
        return self.directory / "rootfs.ext4"

    @property
    def kernel(self) -> Path:
        """The kernel as an ELF file with a PVH entry point."""
        return self.directory / "vmlinux"

    @property
    def initramfs(self) -> Path:
        """The initramfs, which only mounts the root file system."""
        return self.directory / "initramfs.cpio"


def apt_options(suite: str) -> list[str]:
    """Return apt's options for a suite.

    The options for released suites let apt refuse expired package indexes. Otherwise a mirror could
    hide security updates by serving old, signed indexes.
    """
    expiring = ['Acquire::Check-Valid-Until "false"'] if suite in EXPIRING_SUITES else []
    return [*APT_OPTIONS, *expiring]


def mmdebstrap(target: Path, suite: str, *options: str) -> None:
    """Create a root file system of a Debian suite, without documentation."""
    argv = [need("mmdebstrap", "mmdebstrap"), "--quiet", "--architectures=amd64"]
    argv += [f"--aptopt={option}" for option in apt_options(suite)]
    argv += [f"--dpkgopt=path-exclude={pattern}" for pattern in WITHOUT]
    run_step([*argv, *options, suite, str(target)], f"mmdebstrap of Debian {suite}")


def mmdebstrap_any(target: Path, suites: Sequence[str], *options: str) -> str:
    """Try the suites in order, and return the first one whose build succeeds."""
    for attempt, suite in enumerate(suites, start=1):
        try:
            mmdebstrap(target, suite, *options)
            return suite
        except ImageError as error:
            if attempt == len(suites):
                raise
            log.warning("%s\ntrying again with %s", error, suites[attempt])
    raise ValueError("no suite specified")


def _in_user_namespace(argv: Sequence[str]) -> list[str]:
    if os.geteuid() == 0:
        return list(argv)
    return [need("unshare", "util-linux"), "--map-root-user", "--map-auto", "--", *argv]


def ext4_of_tree(tree: Path, image: Path) -> None:
    """Pack a directory as a raw ext4 image without a journal."""
    size = sum(max(p.lstat().st_size, 4096) for p in tree.rglob("*")) // (1 << 20)
    mke2fs = need("mke2fs", "e2fsprogs")
    run_step(
        [mke2fs, "-q", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0", "-m", "0",
         "-d", str(tree), str(image), f"{size * 11 // 10 + 32}M"],
        f"packing {tree}",
    )  # fmt: skip


def ext4_of_tar(tar: Path, image: Path) -> None:
    """Pack a tar file as a raw ext4 image without a journal, with some free space."""
    mke2fs = need("mke2fs", "e2fsprogs")
    size = tar.stat().st_size // (1 << 20) * 12 // 10 + 64
    script = (
        'set -e; mkdir "$3"; trap \'rm -rf "$3"\' EXIT; '
        'tar -xpf "$1" --numeric-owner --exclude="./dev/*" -C "$3"; '
        f'{mke2fs} -q -t ext4 -O ^has_journal -m 0 -d "$3" "$2" {size}M'
    )
    scratch = image.with_name("tree")
    run_step(
        _in_user_namespace(["sh", "-c", script, "sh", str(tar), str(image), str(scratch)]),
        f"packing {tar.name}",
    )


def compile_static(source: Path) -> Path:
    """Return a static program, compiled from a C file unless cached.

    The cache key includes the file's text.
    """
    text = source.read_bytes()
    flags = ["-static", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]

    def build(directory: Path) -> None:
        compiler = need("cc", "gcc libc6-dev")
        run_step(
            [compiler, *flags, "-o", str(directory / source.stem), str(source)],
            f"compiling {source.name}",
        )

    directory = cache.entry(f"bin-{source.stem}", cache.key_of(text, *flags), build)
    return directory / source.stem


def cpio_newc(entries: Sequence[tuple[str, int, bytes]]) -> bytes:
    """Return an initramfs with these entries.

    :param entries: The name, the mode (including the file type) and the content of each file.
    """
    archive = bytearray()
    trailer = ("TRAILER!!!", 0, b"")
    for inode, (name, mode, content) in enumerate([*entries, trailer], start=1):
        encoded = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields)
        archive += encoded
        archive += bytes(-len(archive) % 4)
        archive += content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def extract_vmlinux(bzimage: bytes, tools: TcgHost) -> bytes:
    """Return the ELF kernel in a bzImage.

    Documentation/arch/x86/boot.rst in Linux describes the format (``payload_offset``).
    """
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    # The last four bytes are the uncompressed size, appended by the kernel's makefile.
    payload = bzimage[start : start + length - 4]
    if payload.startswith(b"\xfd7zXZ\0"):
        elf = lzma.decompress(payload)
    else:
        tool = {b"\x02\x21\x4c\x18": "lz4", b"\x28\xb5\x2f\xfd": "zstd"}.get(payload[:4])
        if tool is None:
            raise ImageError(f"unknown kernel compression ({payload[:6].hex()})")
        result = subprocess.run(
            tools.command(tool, "-d", "-c"), input=payload, capture_output=True, check=False
        )
        if result.returncode:
            raise ImageError(f"{tool} cannot unpack the kernel", result.stderr.decode())
        elf = result.stdout
    if not elf.startswith(b"\x7fELF"):
        raise ImageError("the decompressed kernel is not an ELF file")
    return elf


class Modules:
    """The modules of one kernel, in the tar file of the root file system."""

    def __init__(self, tar: tarfile.TarFile, release: str) -> None:
        self.tar = tar
        self.root = f"./usr/lib/modules/{release}"
        self.needs: dict[str, tuple[str, list[str]]] = {}
        for line in self._text("modules.dep").splitlines():
            path, _, needed = line.partition(":")
            self.needs[self._name(path)] = (path, [self._name(n) for n in needed.split()])
        self.builtin = {self._name(path) for path in self._text("modules.builtin").split()}

    def _text(self, name: str) -> str:
        return read_member(self.tar, f"{self.root}/{name}").decode()

    @staticmethod
    def _name(path: str) -> str:
        return path.rsplit("/", 1)[-1].partition(".ko")[0].replace("-", "_")

    def load_order(self, wanted: Sequence[str], optional: Sequence[str]) -> list[str]:
        """Return module names in load order, each after its dependencies."""
        order: list[str] = []

        def visit(name: str) -> None:
            if name in order or name in self.builtin:
                return
            for needed in reversed(self.needs[name][1]):
                visit(needed)
            order.append(name)

        for name in [n for n in optional if n in self.needs] + list(wanted):
            if name not in self.needs and name not in self.builtin:
                raise ImageError(f"the kernel has no module {name}")
            visit(name)
        return order

    def content(self, name: str) -> bytes:
        path = self.needs[name][0]
        data = read_member(self.tar, f"{self.root}/{path}")
        return lzma.decompress(data) if path.endswith(".xz") else data


def read_member(tar: tarfile.TarFile, name: str) -> bytes:
    """Return the content of a file in a tar file."""
    file = tar.extractfile(name)
    if file is None:
        raise ImageError(f"{name} in the root file system is not a regular file")
    with file:
        return file.read()


def _l1_initramfs(tar: tarfile.TarFile, release: str, init: Path) -> bytes:
    modules = Modules(tar, release)
    order = modules.load_order(_BOOT_MODULES, OPTIONAL_BOOT_MODULES)
    entries = [
        ("dev", 0o040755, b""),
        ("modules", 0o040755, b""),
        ("init", 0o100755, init.read_bytes()),
        ("modules/order", 0o100644, "".join(f"{name}\n" for name in order).encode()),
    ]
    entries += [(f"modules/{name}", 0o100644, modules.content(name)) for name in order]
    return cpio_newc(entries)


def tcg_host() -> TcgHost:
    """Return the tree with L0's QEMU and the L2 kernel, built unless cached."""
    packages = ("linux-image-cloud-amd64", "lz4", "qemu-system-x86", "seabios", "zstd")
    key = cache.key_of("bookworm", *packages, *WITHOUT, *APT_OPTIONS, *L2_MODULES,
                       *_L2_KVM_MODULES, "2")  # fmt: skip

    def build(directory: Path) -> None:
        log.info("building the TCG host (Debian 12's QEMU 7.2) for the cache")
        tar = directory / "tree.tar"
        mmdebstrap(tar, "bookworm", "--variant=extract", "--include=" + ",".join(packages))
        unwanted = ["./dev", "./var", "./lib/modules", "./usr/lib/modules"]
        run_step(
            [
                "tar",
                "-xf",
                str(tar),
                "-C",
                str(directory),
                "--no-same-owner",
                *(f"--exclude={path}" for path in unwanted),
            ],
            "unpacking the TCG host",
        )
        with tarfile.open(tar) as tree:
            members = {Path(name).name: name for name in tree.getnames() if name.endswith(".ko")}
            (directory / "modules").mkdir()
            for name in (*L2_MODULES, *_L2_KVM_MODULES):
                content = read_member(tree, members[f"{name}.ko"])
                (directory / "modules" / name).write_bytes(content)
        tar.unlink()
        # Debian builds TCG as a module. Start an empty machine to check that the module loads.
        run_step(
            [
                "sh",
                "-c",
                'echo quit | "$@"',
                "sh",
                *TcgHost(directory).qemu(
                    "-machine", "none", "-accel", "tcg", "-display", "none", "-monitor", "stdio"
                ),
            ],
            "testing the TCG host's QEMU",
        )

    return TcgHost(cache.entry("tcg-host", key, build))


def l2_kernel(host: TcgHost) -> Path:
    """Return the kernel of L2 guests, which is Debian 12's kernel as a bzImage."""
    return next((host.directory / "boot").glob("vmlinuz-*"))


def build(variant: Variant) -> Image:
    """Return the image of a variant, built unless cached."""
    host = tcg_host()
    init = compile_static(_HERE / "init.c")
    hook = (_HERE / "kernel-hook.sh").read_bytes()
    key = cache.key_of(*variant.suites, *variant.packages, hook, *WITHOUT, *APT_OPTIONS,
                       *_BOOT_MODULES, *OPTIONAL_BOOT_MODULES, init.read_bytes(), "1")  # fmt: skip

    def fill(directory: Path) -> None:
        log.info("building the %s image for the cache", variant.name)
        tar_path = directory / "rootfs.tar"
        options = ["--variant=minbase", "--include=" + ",".join(variant.packages),
                   f"--customize-hook=sh '{_HERE}/kernel-hook.sh' \"$1\" {variant.kernel} "
            + " ".join(KEPT_DRIVERS)]  # fmt: skip
        suite = mmdebstrap_any(tar_path, variant.suites, *options)
        with tarfile.open(tar_path) as tar:
            kernel = next(n for n in tar.getnames() if n.startswith("./boot/vmlinuz-"))
            release = kernel.removeprefix("./boot/vmlinuz-")
            elf = extract_vmlinux(read_member(tar, kernel), host)
            (directory / "vmlinux").write_bytes(elf)
            (directory / "initramfs.cpio").write_bytes(_l1_initramfs(tar, release, init))
        ext4_of_tar(tar_path, directory / "rootfs.ext4")
        tar_path.unlink()
        manifest = {"suite": suite, "kernel_release": release}
        (directory / "manifest.json").write_text(json.dumps(manifest))

    directory = cache.entry(f"image-{variant.name}", key, fill)
    return Image(directory, **json.loads((directory / "manifest.json").read_text()))


def l2_initramfs(modules: Path) -> bytes:
    """Return an L2 guest's initramfs, with the workload as init and a few drivers."""
    workload = compile_static(_HERE / "workload.c")
    entries = [("dev", 0o040755, b""), ("init", 0o100755, workload.read_bytes())]
    return cpio_newc([*entries, *modules_directory(modules, "modules", L2_MODULES)])


def modules_directory(
    modules: Path, directory: str, names: Sequence[str]
) -> list[tuple[str, int, bytes]]:
    """Return an initramfs's entries with these modules and a file with their load order."""
    order = "".join(f"{name}\n" for name in names).encode()
    entries = [(directory, 0o040755, b""), (f"{directory}/order", 0o100644, order)]
    for name in names:
        content = (modules / name).read_bytes()
        entries.append((f"{directory}/{name}", 0o100644, content))
    return entries


def l2_files() -> Path:
    """Return the directory with L2's kernel and initramfs, built unless cached."""
    host = tcg_host()
    bzimage = l2_kernel(host)
    modules = host.directory / "modules"
    initramfs = l2_initramfs(modules)
    # KVM's modules are in a separate initramfs, because guests boot faster without them.
    kvm = cpio_newc(modules_directory(modules, "kvm", _L2_KVM_MODULES))

    def fill(directory: Path) -> None:
        shutil.copy(bzimage, directory / "vmlinuz")
        (directory / "vmlinux").write_bytes(extract_vmlinux(bzimage.read_bytes(), host))
        (directory / "initramfs").write_bytes(initramfs)
        (directory / "initramfs-kvm").write_bytes(initramfs + kvm)

    return cache.entry("l2", cache.key_of(str(bzimage), initramfs, kvm), fill)


def files_disk() -> Path:
    """Return the disk with the contents of ``/lab``, built unless cached.

    The disk is separate from the images. If only the command server changes, the lab therefore
    rebuilds this disk but not the images.
    """
    l2 = l2_files()
    own = [_HERE / "command_server.py", _HERE / "start.sh"]

    def fill(directory: Path) -> None:
        tree = directory / "tree"
        shutil.copytree(l2, tree / "lab/l2")
        for path in own:
            shutil.copy(path, tree / "lab" / path.name)
        ext4_of_tree(tree, directory / "files.ext4")
        shutil.rmtree(tree)

    key = cache.key_of(*(path.read_bytes() for path in own), str(l2))
    return cache.entry("files", key, fill) / "files.ext4"
