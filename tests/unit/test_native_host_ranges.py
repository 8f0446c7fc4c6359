# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the plugin's records of memory that QEMU maps while the plugin is loaded."""

from __future__ import annotations

import ctypes
import mmap

import pytest

from support.native import link_with_plugin

START, SIZE = 0x10000000, 1 << 20
MAP_NORESERVE = 0x4000  # asm-generic/mman.h; Python's mmap module may lack this constant
SOURCE = """
#include "plugin/host_ranges.h"
int overcommitted(uint64_t start, uint64_t size, int flags)
{
	pf_ranges_mapped(start, size, -1, flags);
	return !!(pf_ranges_facts(start, size) & MEMORY_OVERCOMMIT);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    directory = tmp_path_factory.mktemp("host-ranges")
    source = directory / "driver.c"
    source.write_text(SOURCE)
    output = link_with_plugin(source, directory / "library.so", "-shared", "-fPIC")
    return ctypes.CDLL(str(output))


@pytest.mark.parametrize(("flags", "expected"), [(0, 0), (MAP_NORESERVE, 1)])
def test_noreserve_mapping_is_overcommitted(
    library: ctypes.CDLL, flags: int, expected: int
) -> None:
    known = library.overcommitted
    known.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int]
    assert known(START, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags) == expected
