# SPDX-License-Identifier: GPL-2.0-or-later
"""A process that looks like a QEMU with the plugin, and whose plugin lies.

    python hostile_plugin.py UUID SOCKET BEHAVIOUR

The process listens on SOCKET in a thread that has the name of the plugin's control thread. It
prints an empty line when it is ready. If root has started the process, it becomes another user.
PYTHONPATH must contain the directory of ``support``.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import threading
import time

from support.lingering import send_descriptor

OTHER_USER = 65534
HONEST = {
    "plugin": 1,
    "vcpus": [],
    "keeping": True,
    "pre_fault_memory": True,
    "quirk": "disable",
    "held": None,
    "pending": 7,
    "counters": {"prefaulted": 4096, "again": 8192, "errors": 3},
}


def changed(**values: object) -> bytes:
    return json.dumps(HONEST | values).encode() + b"\n"


#: The replies, by behaviour.
REPLIES = {
    "honest": changed(),
    "few fields": b'{"plugin":1}\n',
    "array": b"[1]\n",
    "error is a number": b'{"error":7}\n',
    "brackets": b"[" * 60_000 + b"\n",
    "nested object": b'{"a":' * 60_000 + b"\n",
    "not UTF-8": b"\xff\xfe\n",
    "nothing": b"",
    "counters is an array": changed(counters=[1]),
    "counter is huge": changed(pending=1 << 5000),
    "counter is negative": changed(pending=-1),
    "counter is a string": changed(counters={"prefaulted": "x", "again": 0, "errors": 0}),
    "counter is true": changed(pending=True),
    "counter is not a number": changed().replace(b": 7", b": NaN"),
    "number is too long": changed().replace(b": 7", b": " + b"7" * 100_000),
    "surrogates": changed(held="\ud800"),
}


def name_thread(name: bytes) -> None:
    with open(f"/proc/self/task/{threading.get_native_id()}/comm", "wb") as file:
        file.write(name)


def reply(client: socket.socket, behaviour: str) -> None:
    request = client.recv(4096)
    if behaviour == "closes":
        return
    if behaviour == "descriptors":
        for _ in range(10):
            if not send_descriptor(client, REPLIES["few fields"]):
                return
    if behaviour == "endless":
        while True:
            client.sendall(b" " * 65536)
    if behaviour == "single bytes":
        for byte in changed():
            client.sendall(bytes([byte]))
            time.sleep(0.2)
        return
    if behaviour == "honest after a while":
        time.sleep(1)
    while request:
        client.sendall(REPLIES.get(behaviour, REPLIES["honest"]))
        request = client.recv(4096)


def serve(listener: socket.socket, behaviour: str) -> None:
    name_thread(b"prefault/%d" % listener.fileno())
    print(flush=True)
    while True:
        client = listener.accept()[0]
        threading.Thread(target=answer, args=(client, behaviour), daemon=True).start()


def answer(client: socket.socket, behaviour: str) -> None:
    try:
        with client:
            reply(client, behaviour)
    except OSError:
        pass  # the client has disconnected


def wait_named() -> None:
    name_thread(b"\xff\n<0>\x1b[2J")
    threading.Event().wait()


def give_up_root() -> None:
    os.setgroups([])
    os.setresgid(OTHER_USER, OTHER_USER, OTHER_USER)
    os.setresuid(OTHER_USER, OTHER_USER, OTHER_USER)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, as after an exec


def main(_uuid: str, path: str, behaviour: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    if os.geteuid() == 0:
        give_up_root()
    listener.listen(64)
    if behaviour == "thread name":
        threading.Thread(target=wait_named, daemon=True).start()
    serve(listener, behaviour)


if __name__ == "__main__":
    main(*sys.argv[1:4])
