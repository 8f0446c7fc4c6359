# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the conformance suite on a machine with huge pages and KSM.

``python -m qemu_prefault_lab.conformance`` enables huge pages and KSM, so that every supported case
can run, and then runs ``qemu-prefault conformance``. docs/conformance.md shows the results.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from qemu_prefault.cli.main import main

_MM = Path("/sys/kernel/mm")
_SETTINGS = {
    _MM / "transparent_hugepage/enabled": "madvise",
    # khugepaged would collapse 4 KiB pages while a case counts faults.
    _MM / "transparent_hugepage/khugepaged/scan_sleep_millisecs": "1000000",
    # Reserve the 1 GiB page first. Reserving 2 MiB pages first would fragment the memory.
    _MM / "hugepages/hugepages-1048576kB/nr_hugepages": "1",
    _MM / "hugepages/hugepages-2048kB/nr_hugepages": "16",
    _MM / "ksm/pages_to_scan": "1000",
    _MM / "ksm/run": "1",
}


def _read(path: Path) -> str:
    text = path.read_text().strip()
    return text.partition("[")[2].partition("]")[0] or text


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Enable huge pages and KSM within the block.

    The caller must be root.
    """
    before = {path: _read(path) for path in _SETTINGS if path.exists()}
    try:
        for path in before:
            path.write_text(_SETTINGS[path])
        yield
    finally:
        for path, value in before.items():
            path.write_text(value)


if __name__ == "__main__":
    sys.argv[1:1] = ["conformance"]
    with prepared():
        main()
