# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that files of other processes are examined without an unlimited wait."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_prefault.host import file_info
from qemu_prefault.host.file_info import file_status, file_system
from qemu_prefault.host.headroom import Limit
from support.hung_fuse import NAME, fuse
from support.limits import MIB

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting requires root")


def test_figures_are_those_of_the_file_system(tmp_path: Path) -> None:
    figures, found = os.statvfs(tmp_path), file_system(str(tmp_path))
    assert found.size == figures.f_blocks * figures.f_frsize
    assert found.inodes == figures.f_files


def test_hole_is_what_a_file_can_allocate(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(MIB))
    os.truncate(file, 3 * MIB)
    assert file_status(str(file)).hole == 2 * MIB
    assert file_status(str(tmp_path)).hole == 0


@needs_root
def test_hung_server_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_info, "SERVER_MILLISECONDS", 100)
    fd = -1
    try:
        with fuse(tmp_path / "mount", MIB) as hang:
            fd = os.open(tmp_path / "mount" / NAME, os.O_PATH)
            path = f"/proc/self/fd/{fd}"
            assert file_system(path).type == 0x65735546
            hang()
            with pytest.raises(OSError) as caught:
                file_system(path)
            assert caught.value.errno == errno.ETIMEDOUT
    finally:
        os.close(fd)


@given(
    size=st.integers(0, 1 << 40),
    file_bytes=st.integers(0, 1 << 40),
    available=st.integers(0, 1 << 41),
    anonymous=st.booleans(),
)
def test_fitting_bytes_need_no_more_than_is_available(
    size: int, file_bytes: int, available: int, anonymous: bool
) -> None:
    limit = Limit("", available, "", anonymous=anonymous, file_bytes=file_bytes)
    fitting = limit.fitting(available, size)
    assert 0 <= fitting <= size and limit.need(fitting) <= available
    assert fitting == size or limit.need(fitting + 1) > available
