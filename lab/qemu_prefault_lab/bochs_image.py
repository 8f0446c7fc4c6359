# SPDX-License-Identifier: GPL-2.0-or-later
"""The files from which the Bochs lab boots.

Bochs starts a PC with a BIOS and ATA disks. GRUB loads the kernel from the first disk. Debian and
the lab's files are on the second and the third disk. The fourth disk holds the stream of the
command server (:mod:`qemu_prefault_lab.disk_stream`). No file system is mounted on L0.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from . import cache, image
from .steps import need, run_step

log = logging.getLogger(__name__)

_HERE: Final = Path(__file__).parent
_TRIXIE: Final = image.VARIANTS["trixie"]
_SID: Final = image.VARIANTS["sid"]
VARIANTS: Final = {
    "ept": image.Variant("ept", _TRIXIE.suites, _TRIXIE.packages),  # kernel 6.12, QEMU 10.0
    "ept-sid": image.Variant("ept-sid", _SID.suites, _SID.packages),
}
_DISK_MODULES: Final = ("scsi_mod", "sd_mod", "libata", "ata_piix")
_ROOT_MODULES: Final = ("ext4", "overlay")
_L2_KVM_MODULES: Final = ("irqbypass", "kvm", "kvm-intel")
# lz4 decompresses this kernel.
_L2_PACKAGES: Final = ("linux-image-cloud-amd64", "lz4")
_SERVER: Final = ("command_server.py", "disk_stream.py", "disk_server.py")
# Bochs derives a disk's geometry from its size, which must be a whole number of cylinders
# (16 heads, 63 sectors per track).
_CYLINDER: Final = 16 * 63 * 512
# The offset of the boot disk's only partition. GRUB's core image is before it.
_PARTITION: Final = 1 << 20


@dataclass(frozen=True)
class BochsImage:
    """A directory with the built image of a variant."""

    directory: Path
    suite: str
    kernel_release: str

    @property
    def root(self) -> Path:
        """The disk with Debian, to which L1 never writes."""
        return self.directory / "root.img"

    @property
    def kernel(self) -> Path:
        """The kernel as Debian ships it."""
        return self.directory / "vmlinuz"

    @property
    def initramfs(self) -> Path:
        """The initramfs, which only finds and mounts the disks."""
        return self.directory / "initramfs.cpio"


def whole_cylinders(size: int) -> int:
    """Return the size of the smallest valid disk with at least ``size`` bytes."""
    return -(-size // _CYLINDER) * _CYLINDER


def _finish_disk(path: Path, label: str) -> None:
    """Label an ext4 image and extend the file to a whole number of cylinders."""
    run_step([need("e2label", "e2fsprogs"), str(path), label], f"labelling {path.name}")
    os.truncate(path, whole_cylinders(path.stat().st_size))


def build(variant: image.Variant) -> BochsImage:
    """Return the image of a variant, built unless cached."""
    init = image.compile_static(_HERE / "init.c")
    finder = image.compile_static(_HERE / "bochs-init.c")
    drivers = (*image.KEPT_DRIVERS, "ata/", "scsi/")
    hook = _HERE / "kernel-hook.sh"
    key = cache.key_of(*variant.suites, *variant.packages, hook.read_bytes(), *image.WITHOUT,
                       *image.APT_OPTIONS, *_DISK_MODULES, *_ROOT_MODULES, *drivers,
                       init.read_bytes(), finder.read_bytes(), "1")  # fmt: skip

    def fill(directory: Path) -> None:
        log.info("building the %s image for the cache", variant.name)
        tar_path = directory / "root.tar"
        customize = f"sh '{hook}' \"$1\" {variant.kernel} {' '.join(drivers)}"
        options = ["--variant=minbase", "--include=" + ",".join(variant.packages)]
        options.append(f"--customize-hook={customize}")
        suite = image.mmdebstrap_any(tar_path, variant.suites, *options)
        with tarfile.open(tar_path) as tar:
            kernel = next(n for n in tar.getnames() if n.startswith("./boot/vmlinuz-"))
            release = kernel.removeprefix("./boot/vmlinuz-")
            (directory / "vmlinuz").write_bytes(image.read_member(tar, kernel))
            modules = image.Modules(tar, release)
            (directory / "initramfs.cpio").write_bytes(_initramfs(modules, finder, init))
        image.ext4_of_tar(tar_path, directory / "root.img")
        _finish_disk(directory / "root.img", "lab-root")
        tar_path.unlink()
        manifest = {"suite": suite, "kernel_release": release}
        (directory / "manifest.json").write_text(json.dumps(manifest))

    directory = cache.entry(f"image-{variant.name}", key, fill)
    return BochsImage(directory, **json.loads((directory / "manifest.json").read_text()))


def _initramfs(modules: image.Modules, finder: Path, init: Path) -> bytes:
    entries = [
        ("dev", 0o040755, b""),
        ("init", 0o100755, finder.read_bytes()),
        ("lab-init", 0o100755, init.read_bytes()),
    ]
    disks = modules.load_order(_DISK_MODULES, ())
    both = modules.load_order((*_DISK_MODULES, *_ROOT_MODULES), image.OPTIONAL_BOOT_MODULES)
    root = [name for name in both if name not in disks]
    for directory, order in (("ata", disks), ("modules", root)):
        entries.append((directory, 0o040755, b""))
        text = "".join(f"{name}\n" for name in order)
        entries.append((f"{directory}/order", 0o100644, text.encode()))
        entries += [(f"{directory}/{name}", 0o100644, modules.content(name)) for name in order]
    return image.cpio_newc(entries)


def _l2_kernel() -> Path:
    """Return a directory with L2's kernel and its modules, built unless cached.

    This is the kernel of the L2 guests on NPT, but with the module for Intel's CPUs.
    """
    names = (*image.L2_MODULES, *_L2_KVM_MODULES)

    def fill(directory: Path) -> None:
        tar_path, tree = directory / "tree.tar", directory / "tree"
        include = "--include=" + ",".join(_L2_PACKAGES)
        image.mmdebstrap(tar_path, "bookworm", "--variant=extract", include)
        (directory / "modules").mkdir()
        tree.mkdir()
        programs = ["./usr/bin", "./usr/lib/x86_64-linux-gnu", "./lib", "./lib64"]
        argv = ["tar", "-xf", str(tar_path), "-C", str(tree), "--no-same-owner"]
        run_step([*argv, "--exclude=./lib/modules", *programs], "unpacking lz4")
        with tarfile.open(tar_path) as tar:
            members = tar.getnames()
            kernel = next(n for n in members if n.startswith("./boot/vmlinuz-"))
            bzimage = image.read_member(tar, kernel)
            (directory / "vmlinuz").write_bytes(bzimage)
            elf = image.extract_vmlinux(bzimage, image.TcgHost(tree))
            (directory / "vmlinux").write_bytes(elf)
            paths = {Path(name).name: name for name in members if name.endswith(".ko")}
            for name in names:
                content = image.read_member(tar, paths[f"{name}.ko"])
                (directory / "modules" / name).write_bytes(content)
        tar_path.unlink()
        shutil.rmtree(tree)

    key = cache.key_of("bookworm", *_L2_PACKAGES, *names, *image.WITHOUT, *image.APT_OPTIONS)
    return cache.entry("l2-kernel-ept", key, fill)


def _l2_files() -> Path:
    """Return the directory with L2's kernel and initramfs, built unless cached."""
    source = _l2_kernel()
    initramfs = image.l2_initramfs(source / "modules")
    kvm = image.cpio_newc(image.modules_directory(source / "modules", "kvm", _L2_KVM_MODULES))

    def fill(directory: Path) -> None:
        for name in ("vmlinuz", "vmlinux"):
            shutil.copy(source / name, directory)
        (directory / "initramfs").write_bytes(initramfs)
        (directory / "initramfs-kvm").write_bytes(initramfs + kvm)

    return cache.entry("l2-ept", cache.key_of(str(source), initramfs, kvm), fill)


def files_disk() -> Path:
    """Return the disk with the contents of ``/lab``, built unless cached."""
    l2 = _l2_files()
    own = [_HERE / name for name in (*_SERVER, "bochs-start.sh")]

    def fill(directory: Path) -> None:
        tree = directory / "tree"
        shutil.copytree(l2, tree / "lab/l2")
        package = tree / "lab/server"
        package.mkdir()
        (package / "__init__.py").touch()
        for name in _SERVER:
            shutil.copy(_HERE / name, package)
        shutil.copy(_HERE / "bochs-start.sh", tree / "lab/start.sh")
        image.ext4_of_tree(tree, directory / "files.img")
        _finish_disk(directory / "files.img", "lab-files")
        shutil.rmtree(tree)

    key = cache.key_of(*(path.read_bytes() for path in own), str(l2), "1")
    return cache.entry("files-ept", key, fill) / "files.img"


def make_boot_disk(path: Path, grub: Path, system: BochsImage, kernel_args: str) -> None:
    """Create a disk from which GRUB boots the system's kernel.

    GRUB's boot.img expects core.img in the second sector, and core.img's first sector expects the
    rest behind it. grub-install changes these addresses only for other layouts.

    :param grub: The directory with ``boot.img`` and ``core.img``.
    """
    tree = path.with_name("boot-tree")
    (tree / "boot/grub").mkdir(parents=True)
    shutil.copy(system.kernel, tree / "boot/vmlinuz")
    shutil.copy(system.initramfs, tree / "boot/initramfs")
    (tree / "boot/grub/grub.cfg").write_text(
        f"linux /boot/vmlinuz {kernel_args}\ninitrd /boot/initramfs\nboot\n"
    )
    content = sum(file.stat().st_size for file in tree.rglob("*"))
    partition = (content // (1 << 20) + 8) << 20
    size = whole_cylinders(_PARTITION + partition)
    path.touch()
    os.truncate(path, size)
    run_step(
        [need("mke2fs", "e2fsprogs"), "-q", "-F", "-t", "ext2", "-b", "4096", "-m", "0",
         "-E", f"offset={_PARTITION},root_owner=0:0", "-d", str(tree), str(path),
         f"{partition >> 10}K"],
        "creating the boot disk",
    )  # fmt: skip
    shutil.rmtree(tree)
    # One active entry of type 83h (Linux) in the partition table, with addresses in sectors only.
    entry = struct.pack("<B3sB3sII", 0x80, b"\0\x21\0", 0x83, b"\xfe\xff\xff", _PARTITION // 512,
                        (size - _PARTITION) // 512)  # fmt: skip
    boot = bytearray((grub / "boot.img").read_bytes())
    boot[446:510] = entry.ljust(64, b"\0")
    with path.open("r+b") as disk:
        disk.write(boot)
        disk.write((grub / "core.img").read_bytes())
