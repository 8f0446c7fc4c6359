# SPDX-License-Identifier: GPL-2.0-or-later
"""Send file descriptors that block the process that closes them.

This module uses only Python's standard library, because hostile_qemu.py and hostile_plugin.py also
run as another user.
"""

from __future__ import annotations

import array
import contextlib
import socket
import struct
import threading

#: Seconds for which a close() of the last descriptor of such a socket blocks.
LINGER_SECONDS = 45
#: The other ends of the connections, which never read.
_OTHER_ENDS: list[socket.socket] = []


def lingering_socket() -> socket.socket:
    """Return a TCP socket whose close() blocks: it has unsent data and SO_LINGER."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        client = socket.create_connection(listener.getsockname())
        _OTHER_ENDS.append(listener.accept()[0])
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    linger = struct.pack("ii", 1, LINGER_SECONDS)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            client.send(b"x" * 4096)
    return client


def send_descriptor(client: socket.socket, data: bytes, flags: int = 0) -> bool:
    """Send data with the only descriptor of a lingering socket.

    If the kernel refuses descriptors for the receiver (SO_PASSRIGHTS), the function sends only the
    data.

    :returns: Whether the descriptor was sent.
    """
    lingering = lingering_socket()
    rights = array.array("i", [lingering.fileno()])
    try:
        client.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], flags)
    except OSError as error:
        lingering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        if not isinstance(error, PermissionError):
            raise
        client.send(data, flags)
        return False
    finally:
        # The receiver may have closed its copy. A thread waits instead of this one.
        threading.Thread(target=lingering.close, daemon=True).start()
    return True
