# SPDX-License-Identifier: GPL-2.0-or-later
"""Start a process with a chosen pid, to simulate a host on which pids are reused."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
#: Maximum number of attempts, because other programs on the host also start processes.
ATTEMPTS = 200


def start_with_pid(pid: int) -> subprocess.Popen[bytes]:
    """Return a ``cat`` process with this pid, which must be free.

    Skip the test if this process has no permission to choose pids.
    """
    if not os.access(LAST_PID, os.W_OK):
        pytest.skip(f"{LAST_PID} is not writable, so no pid can be reused")
    for _ in range(ATTEMPTS):
        try:
            LAST_PID.write_text(str(pid - 1))
        except PermissionError:
            pytest.skip("choosing a pid needs CAP_CHECKPOINT_RESTORE")
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if process.pid == pid:
            return process
        process.kill()
        process.communicate()
    raise AssertionError(f"another process uses pid {pid}")
