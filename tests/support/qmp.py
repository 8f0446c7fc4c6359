# SPDX-License-Identifier: GPL-2.0-or-later
"""A QMP client that observes a QEMU on a monitor that the tool does not use."""

from __future__ import annotations

import socket

from qemu_prefault_lab.qmp import Qmp


class QmpClient(Qmp):
    """The lab's QMP client, connected to a socket path."""

    def __init__(self, path: str) -> None:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(20)
        connection.connect(path)
        super().__init__(connection)

    def status(self) -> str:
        status: str = self.execute("query-status")["status"]
        return status

    def wait_migration(self, status: str) -> None:
        """Wait for the MIGRATION event with this status, and discard earlier events."""
        while self.wait_event("MIGRATION")["data"]["status"] != status:
            pass
