# SPDX-License-Identifier: GPL-2.0-or-later
"""Find the file system of a mapped file, and the limit that it sets.

The mount table of QEMU does not list a mount that is outside of QEMU's root directory
(``-chroot``), or that was unmounted while QEMU uses it. If no mount table lists the file system,
this module asks the file itself.

If the type of a file system is unknown, its files may exist only in memory: an overlay, for
example, can store its files on a tmpfs. The plugin applies the same rule
(``pf_source_is_stacked()``, native/common/memory_source.c).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import Final

from . import proc_files
from .bounded import list_bounded
from .file_info import FileSystem, file_status, file_system
from .headroom import Limit
from .mappings import MemoryMapping
from .proc_files import lines_of, read_optional
from .procfs import Process
from .unwritten import FileId, Unwritten, find_unwritten


class FileKind(Enum):
    """Where the bytes of a file are."""

    MEMORY = "only in memory, in pages of the base size"
    HUGETLB = "in huge pages"
    DISK = "on a disk, or on another host"
    SERVER = "at a FUSE server, which may store them in memory"
    STACKED = "on another file system, which may be a tmpfs"


#: The kinds whose files may exist only in memory.
_MAYBE_MEMORY: Final = frozenset({FileKind.MEMORY, FileKind.SERVER, FileKind.STACKED})
_BY_NAME: Final = {
    **dict.fromkeys(("tmpfs", "ramfs", "devtmpfs"), FileKind.MEMORY),
    "hugetlbfs": FileKind.HUGETLB,
    **dict.fromkeys(("btrfs", "bcachefs", "zfs", "ceph", "cifs", "smb3"), FileKind.DISK),
    **dict.fromkeys(("nfs", "nfs4", "9p", "gfs2", "ocfs2"), FileKind.DISK),
}
#: The types that statfs(2) reports (include/uapi/linux/magic.h).
_BY_TYPE: Final = {
    0x01021994: FileKind.MEMORY,  # tmpfs
    0x858458F6: FileKind.MEMORY,  # ramfs
    0x958458F6: FileKind.HUGETLB,
    0x65735546: FileKind.SERVER,  # FUSE, virtiofs
    0x9123683E: FileKind.DISK,  # btrfs
    0xCA451A4E: FileKind.DISK,  # bcachefs
    0x2FC12FC1: FileKind.DISK,  # ZFS
    0x6969: FileKind.DISK,  # NFS
    0x01021997: FileKind.DISK,  # 9p
    0x00C36400: FileKind.DISK,  # Ceph
    0xFF534D42: FileKind.DISK,  # CIFS
    0xFE534D42: FileKind.DISK,  # SMB2
}


def is_disk_file(process: Process, mapping: MemoryMapping) -> bool:
    """Return whether a mapping is a shared file that may be on a disk.

    Files on tmpfs, ramfs, devtmpfs and hugetlbfs are not on a disk.
    """
    if not mapping.shared or mapping.inode == 0 or _is_internal(mapping):
        return False
    kind = file_kind(process, mapping)
    if kind is not None:
        return kind not in (FileKind.MEMORY, FileKind.HUGETLB)
    return mapping.path.startswith("/") and not mapping.path.startswith("/dev/")


def is_on_fuse(process: Process, mapping: MemoryMapping) -> bool:
    """Return whether a file on FUSE is mapped. The server may never respond to a system call."""
    if mapping.inode == 0 or _is_internal(mapping):
        return False
    return file_kind(process, mapping) in (FileKind.SERVER, None)


def is_in_memory(process: Process, mapping: MemoryMapping) -> bool:
    """Return whether a mapping is a shared file that may exist only in memory, such as a memfd."""
    if not mapping.shared or mapping.inode == 0:
        return False
    if _is_internal(mapping):
        return mapping.path.startswith("/memfd:")
    kind = file_kind(process, mapping)
    return kind is None or kind in _MAYBE_MEMORY


def copied_bytes(process: Process, mapping: MemoryMapping) -> int:
    """Return how many bytes of a file populating allocates in addition to QEMU's private copies.

    This happens in a private mapping of a file that exists only in memory and has holes. The page
    fault first allocates the file's page (mm/shmem.c, ``shmem_fault()``). The result is an upper
    bound, because the holes may be outside of the mapping, or QEMU may have copied the pages.
    """
    if mapping.shared or mapping.inode == 0:
        return 0
    if not mapping.path.startswith("/memfd:"):
        if _is_internal(mapping):
            return 0
        kind = file_kind(process, mapping)
        if kind is not None and kind not in _MAYBE_MEMORY:
            return 0
    path = _reach(process, mapping)
    with contextlib.suppress(OSError):
        if path is not None:
            return min(mapping.size, file_status(path).hole)
    return mapping.size


def file_kind(process: Process, mapping: MemoryMapping) -> FileKind | None:
    """Return the kind of a mapped file, or None if this process cannot find it out."""
    name = _mounted_type(process, mapping.device)
    if name is None:
        figures = _ask(process, mapping)
        if figures is None:
            return None
        return kind_of_type(figures.type, mapping.device[0])
    if name.startswith(("fuse", "virtiofs")):
        return FileKind.SERVER
    return _BY_NAME.get(name) or _kind_of_device(mapping.device[0])


def kind_of_type(number: int, major: int) -> FileKind:
    """Return the kind of a file from the type that statfs(2) reports.

    :param major: The major number of the file's device, which is 0 without a block device.
    """
    return _BY_TYPE.get(number & 0xFFFFFFFF) or _kind_of_device(major)


def _kind_of_device(major: int) -> FileKind:
    return FileKind.DISK if major else FileKind.STACKED


def _mounted_type(process: Process, device: tuple[int, int]) -> str | None:
    """Return the type of a file system, or None if neither process has mounted it."""
    for proc in (process.proc, f"{proc_files.PROC}/self"):
        for line in lines_of(read_optional(f"{proc}/mountinfo") or ""):
            before, dash, after = line.partition(" - ")
            fields = before.split(" ")
            if dash and len(fields) > 2 and fields[2] == f"{device[0]}:{device[1]}":
                return after.split(" ")[0]
    return None


def _ask(process: Process, mapping: MemoryMapping) -> FileSystem | None:
    path = _reach(process, mapping)
    with contextlib.suppress(OSError):
        return file_system(path) if path is not None else None
    return None


def _is_internal(mapping: MemoryMapping) -> bool:
    """Return whether the mapped file is on a kernel-internal mount.

    For example, memfds are on such a mount.
    """
    return mapping.path.startswith(("/memfd:", "/dev/zero", "/SYSV", "/anon_hugepage"))


def file_system_limit(
    process: Process, mapping: MemoryMapping, together: AbstractSet[FileId] = frozenset()
) -> list[Limit]:
    """Return a list that contains the limit of a mapped file's file system.

    The list is empty if populating allocates no pages of the file, or if the file system has no
    size limit. A memfd and shared anonymous memory are on a kernel-internal mount, which has no
    size limit.

    :param together: Other files that the caller populates. The limit does not subtract the
        unwritten parts of these files.
    """
    if mapping.inode == 0 or _is_internal(mapping):
        return []
    # The size of a hugetlbfs also limits private mappings (mm/hugetlb.c, subpools).
    kind = file_kind(process, mapping)
    shared = mapping.shared or kind is FileKind.HUGETLB
    copied = 0 if shared else copied_bytes(process, mapping)
    if not shared and not copied:
        return []
    name = _name(process, mapping)
    device = os.makedev(*mapping.device)
    path = _reach(process, mapping)
    figures = _ask(process, mapping)
    if figures is None or path is None:
        why = f"qemu-prefault cannot read the free space of {name}"
        return [Limit(name, 0, why, device=device, unknown=why)]
    if not figures.size:
        return []
    ours = {(mapping.device, mapping.inode), *together}
    counted = path if kind is FileKind.MEMORY else None
    others = find_unwritten(process, mapping.device, counted, in_memory=kind is not FileKind.DISK)
    if others.unseen != 0:
        why = _unseen(name, others)
        return [Limit(name, 0, why, device=device, unknown=why)]
    promised = others.total(ours)
    detail = f"{figures.available} bytes are free, of which {promised} are committed to other files"
    left = max(0, figures.available - promised)
    return [Limit(name, left, detail, anonymous=shared, file_bytes=copied, device=device)]


def _name(process: Process, mapping: MemoryMapping) -> str:
    path = mapping.path.removesuffix(" (deleted)")
    if _mounted_type(process, mapping.device) is None:
        return f"the file system of QEMU's file {path}, which is not mounted here,"
    return f"the file system of {os.path.dirname(path) or '/'}"


def _unseen(name: str, others: Unwritten) -> str:
    count = "an unknown number of files" if others.unseen is None else f"{others.unseen} files"
    if others.unseen == 1:
        count = "1 file"
    return (
        f"{name} may contain {count} that qemu-prefault cannot find, so the memory that other "
        "processes can still allocate from it is unknown"
    )


def _reach(process: Process, mapping: MemoryMapping) -> str | None:
    """Return a path at which this process can access the mapped file, or None."""
    path = f"{process.proc}/map_files/{mapping.start:x}-{mapping.end:x}"
    with contextlib.suppress(OSError):
        if file_status(path).inode == mapping.inode:
            return path
    # map_files needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE (proc_map_files_get_link(),
    # fs/proc/base.c). The path in maps may name another file by now. QEMU keeps the file open, so
    # search QEMU's descriptors.
    shown = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mapping.path)
    with contextlib.suppress(OSError):
        for number in list_bounded(f"{process.proc}/fd"):
            path = f"{process.proc}/fd/{number}"
            with contextlib.suppress(OSError):
                # Other descriptors may be files of a server that does not respond.
                if os.readlink(path) not in (mapping.path, shown):
                    continue
                if file_status(path).inode == mapping.inode:
                    return path
    return None
