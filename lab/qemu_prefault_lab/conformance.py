# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab in which every conformance case that can run does: huge pages of each kind, and KSM.

``python -m qemu_prefault_lab.conformance`` runs ``qemu-prefault conformance`` so; for
docs/conformance.md.
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
    # The large page first: small ones would take the memory apart.
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
    """This machine's memory management set for the suite, and set back. Needs root."""
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
