# SPDX-License-Identifier: GPL-2.0-or-later
"""A program that plays QEMU and lies to qemu-prefault in one way.

    python hostile_qemu.py QMP_SOCKET LIE

The program creates a VM with one vCPU, answers QMP commands like QEMU 10, and gives up root's
rights. LIE is a key of :data:`LIES`, or ``honest``. The program prints its pid when the monitor
listens, and writes each command that it receives to the file QMP_SOCKET.commands. It uses only
Python's standard library and :mod:`support.lingering`, because it must also run as another user.
PYTHONPATH must contain the directory of ``support``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from support.lingering import send_descriptor

OTHER_USER = 65534
MIB = 1 << 20
RAM = 32 * MIB
KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_SET_USER_MEMORY_REGION = 0xAE01, 0xAE41, 0x4020AE46
PR_SET_NAME, PR_SET_MM, PR_SET_MM_MAP = 15, 35, 14
POPULATE_WRITE = 23
#: The range in which qemu-prefault maps helpers (agents/gadgets.py), and their code's size.
AREAS, CODE_SIZE = range(0x1000_0000_0000, 0x5000_0000_0000), 4096
ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202e\n<0>owned\udcff"
GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""},
                    "capabilities": []}}  # fmt: skip
MTREE = f"""FlatView #0
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-{RAM - 1:016x} (prio 0, ram): pc.ram KVM
  00000000fee00000-00000000feefffff (prio 4096, i/o): kvm-apic-msi

"""
RAMBLOCK = "Block Name PSize Offset Used Total HVA RO\n"
libc = ctypes.CDLL(None, use_errno=True)
MEMORY = os.open("/proc/self/mem", os.O_RDWR)

Answer = Any


class Command(Exception):
    """The error reply to a QMP command."""


class Fake:
    """The false QEMU. A lie replaces methods and attributes of it."""

    def __init__(self, path: str) -> None:
        kvm = os.open("/dev/kvm", os.O_RDWR)
        self.vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
        self.vcpu = fcntl.ioctl(self.vm, KVM_CREATE_VCPU, 0)
        self.ram = mmap.mmap(-1, RAM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.hva = ctypes.addressof(ctypes.c_char.from_buffer(self.ram))
        slot = struct.pack("=IIQQQ", 0, 0, 0, RAM, self.hva)
        fcntl.ioctl(self.vm, KVM_SET_USER_MEMORY_REGION, slot)
        self.running = True
        self.path = path
        self.thread_ids = [self.wait_in_thread()]
        self.wait_in_thread()  # an idle thread
        self.before_listen: Callable[[], None] = lambda: None
        self.replies: dict[str, Callable[[dict[str, Any]], Answer]] = {
            "qmp_capabilities": lambda _: {},
            "query-status": lambda _: {
                "status": "running" if self.running else "paused",
                "running": self.running,
            },
            "query-kvm": lambda _: {"enabled": True, "present": True},
            "query-cpus-fast": lambda _: [
                {
                    "thread-id": tid,
                    "qom-path": f"/machine/cpu[{index}]",
                    "cpu-index": index,
                    "target": "x86_64",
                    "props": {"core-id": index, "thread-id": 0, "socket-id": 0},
                }
                for index, tid in enumerate(self.thread_ids)
            ],
            "query-memdev": lambda _: [],
            "query-memory-devices": lambda _: [],
            "query-memory-size-summary": lambda _: {"base-memory": RAM, "plugged-memory": 0},
            "query-migrate": lambda _: {},
            "stop": lambda _: self.set_running(False),
            "cont": lambda _: self.set_running(True),
            "qom-get": self.qom_get,
            "human-monitor-command": lambda arguments: self.hmp(arguments["command-line"]),
        }
        self.mtree = MTREE

    @staticmethod
    def qom_get(arguments: dict[str, Any]) -> Answer:
        if arguments["property"] == "apic-id":
            return 0
        raise Command("property not found")

    def hmp(self, line: str) -> str:
        if line == "info mtree -f":
            return self.mtree
        if line == "info ramblock":
            return self.ramblock()
        if line.startswith("gpa2hva "):
            gpa = int(line.split()[1], 0)
            return f"Host virtual address for {gpa:#x} (pc.ram) is {self.hva + gpa:#x}\r\n"
        if line == "info numa":
            return "0 nodes\r\n"
        raise Command("unknown command")

    def ramblock(self) -> str:
        return (
            "              Block Name    PSize              Offset               Used"
            "              Total                HVA  RO\r\n"
            f"                  pc.ram    4 KiB  {0:#018x} {RAM:#018x} {RAM:#018x} {self.hva:#018x}"
            "  rw\r\n"
        )

    def set_running(self, running: bool) -> Answer:
        self.running = running
        return {}

    @staticmethod
    def wait_in_thread() -> int:
        thread = threading.Thread(target=threading.Event().wait, daemon=True)
        thread.start()
        return thread.native_id or 0

    # --- the monitor ---

    def listen(self) -> None:
        self.commands = open(f"{self.path}.commands", "a", buffering=1)  # noqa: SIM115
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(8)

    def serve(self) -> None:
        while True:
            client, _ = self.listener.accept()
            threading.Thread(target=self.converse, args=(client,), daemon=True).start()

    def converse(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            self.greet(client)
            text = ""
            while data := client.recv(65536):
                # 0xff resets QEMU's JSON parser.
                text = (text.encode() + data).rpartition(b"\xff")[2].decode()
                with contextlib.suppress(ValueError):  # the rest is an incomplete request
                    while text := text.lstrip():
                        request, end = json.JSONDecoder().raw_decode(text)
                        text = text[end:]
                        self.answer(client, request)

    def greet(self, client: socket.socket) -> None:
        self.send(client, GREETING)

    def answer(self, client: socket.socket, request: dict[str, Any]) -> None:
        self.commands.write(request["execute"] + "\n")
        message: dict[str, Any] = {}
        if "id" in request:
            message["id"] = request["id"]
        try:
            reply = self.replies.get(request["execute"])
            if reply is None:
                raise Command("unknown command")
            message["return"] = reply(request.get("arguments", {}))
        except Command as error:
            message["error"] = {"class": "CommandNotFound", "desc": str(error)}
        self.send(client, message)

    def send(self, client: socket.socket, message: Answer) -> None:
        client.sendall(json.dumps(message).encode() + b"\r\n")

    # --- the helper ---

    def on_helper(self, act: Callable[[int], None]) -> None:
        """Call a function again and again with the address of the first helper's control page."""

        def find() -> int:
            while True:
                with open("/proc/self/maps") as maps:
                    for line in maps:
                        start = int(line.split("-")[0], 16)
                        if start in AREAS and " rw-p " in line:
                            return start
                time.sleep(0.001)

        def watch() -> None:
            while True:
                control = find()
                with contextlib.suppress(OSError):  # the helper has exited
                    while True:
                        act(control)

        threading.Thread(target=watch, daemon=True).start()


LIES: dict[str, Callable[[Fake], None]] = {"honest": lambda fake: None}


def lie(name: str) -> Callable[[Callable[[Fake], None]], Callable[[Fake], None]]:
    def register(function: Callable[[Fake], None]) -> Callable[[Fake], None]:
        LIES[name] = function
        return function

    return register


def replying(
    command: str, reply: Callable[[Fake, dict[str, Any]], Answer]
) -> Callable[[Fake], None]:
    def set_up(fake: Fake) -> None:
        fake.replies[command] = lambda arguments: reply(fake, arguments)

    return set_up


def instead(command: str, value: Answer) -> Callable[[Fake], None]:
    return replying(command, lambda _, __: value)


def sleep(_fake: Fake | None = None, _arguments: Answer = None) -> Answer:
    time.sleep(3600)


def nested(depth: int) -> Answer:
    value: Answer = 1
    for _ in range(depth):
        value = [value]
    return value


# --- the monitor lies ---


@lie("monitor: endless greeting")
def _(fake: Fake) -> None:
    def greet(client: socket.socket) -> None:
        client.sendall(b'{"QMP": "')
        while True:
            client.sendall(b"x" * MIB)

    fake.greet = greet  # type: ignore[method-assign]


@lie("monitor: endless answer")
def _(fake: Fake) -> None:
    def answer(client: socket.socket, request: dict[str, Any]) -> None:
        if request["execute"] != "query-kvm":
            Fake.answer(fake, client, request)
            return
        client.sendall(b'{"return": "')
        while True:
            client.sendall(b"x" * MIB)

    fake.answer = answer  # type: ignore[method-assign]


@lie("monitor: endless events")
def _(fake: Fake) -> None:
    def answer(client: socket.socket, request: dict[str, Any]) -> None:
        Fake.answer(fake, client, request)
        if request["execute"] == "query-cpus-fast":
            while True:
                Fake.send(
                    fake, client, {"event": ESCAPES, "timestamp": {}, "data": {"a": "x" * 999}}
                )

    fake.answer = answer  # type: ignore[method-assign]


@lie("monitor: answers byte by byte")
def _(fake: Fake) -> None:
    def send(client: socket.socket, message: Answer) -> None:
        for byte in json.dumps(message).encode() + b"\r\n":
            client.sendall(bytes([byte]))
            time.sleep(0.2)

    fake.send = send  # type: ignore[method-assign]


@lie("monitor: slow answers")
def _(fake: Fake) -> None:
    def send(client: socket.socket, message: Answer) -> None:
        if "return" in message:
            time.sleep(2)
        Fake.send(fake, client, message)

    fake.send = send  # type: ignore[method-assign]


def silent_after(commands: int) -> Callable[[Fake], None]:
    """Reply to a number of commands, and then never again."""

    def set_up(fake: Fake) -> None:
        served: list[str] = []

        def answer(client: socket.socket, request: dict[str, Any]) -> None:
            served.append(request["execute"])
            if len(served) > commands:
                sleep()
            Fake.answer(fake, client, request)

        fake.answer = answer  # type: ignore[method-assign]

    return set_up


for _commands in (1, 10, 19, 20, 21, 25):
    LIES[f"monitor: silence after {_commands} commands"] = silent_after(_commands)


def wide(value: str, size: int = 4 * MIB - 9000) -> bytes:
    """Return a JSON array of ``size`` bytes that repeats a value."""
    count = size // (len(value) + 1)
    return b"[" + b",".join([value.encode()] * count) + b"]"


def with_extra(extra: bytes, *commands: str) -> Callable[[Fake], None]:
    """Add a member with the value ``extra`` to the replies to these commands, which are objects."""

    def set_up(fake: Fake) -> None:
        def answer(client: socket.socket, request: dict[str, Any]) -> None:
            command = request["execute"]
            if command not in commands:
                Fake.answer(fake, client, request)
                return
            reply = fake.replies.get(command)
            usual = {"status": "none"} if reply is None else reply({})
            body = json.dumps(usual)[1:-1].encode()
            client.sendall(
                b'{"id": %s, "return": {"extra": %s%s}}\r\n'
                % (json.dumps(request.get("id")).encode(), extra, b", " * bool(body) + body)
            )

        fake.answer = answer  # type: ignore[method-assign]

    return set_up


OBJECTS = ("query-status", "query-kvm", "query-migrate", "query-memory-size-summary",
           "query-dirty-rate")  # fmt: skip
LIES["monitor: one wide answer"] = with_extra(wide('{"":{}}'), "query-status")
LIES["monitor: wide answers"] = with_extra(wide('{"":{}}'), *OBJECTS)
LIES["monitor: many smaller wide answers"] = with_extra(wide("[]", 300_000), *OBJECTS)
LIES["monitor: long answers"] = with_extra(b'"' + b"x" * (3 * MIB) + b'\xf0\x9f\x98\x80"', *OBJECTS)


LIES["info mtree: a million lines"] = lambda fake: setattr(fake, "mtree", "a\n" * MIB + MTREE)
LIES["info mtree: a character of four bytes"] = lambda fake: setattr(
    fake, "mtree", " x\n" * (MIB // 2) + "\N{GRINNING FACE}" + MTREE
)


@lie("monitor: large events")
def _(fake: Fake) -> None:
    def answer(client: socket.socket, request: dict[str, Any]) -> None:
        for name in ("STOP", "RESET", "MIGRATION", "JOB_STATUS_CHANGE"):
            event = {"event": name, "timestamp": {}, "data": {"a": ["x" * 900] * 40}}
            for _ in range(100):
                fake.send(client, event)
        Fake.answer(fake, client, request)

    fake.answer = answer  # type: ignore[method-assign]


NOISE = json.dumps({"event": "NOISE", "timestamp": {}, "data": {}}).encode() + b"\r\n"


@lie("monitor: descriptors in the greeting")
def _(fake: Fake) -> None:
    def greet(client: socket.socket) -> None:
        send_descriptor(client, json.dumps(GREETING).encode() + b"\r\n")

    fake.greet = greet  # type: ignore[method-assign]


@lie("monitor: descriptors after many events")
def _(fake: Fake) -> None:
    def answer(client: socket.socket, request: dict[str, Any]) -> None:
        if request["execute"] == "query-cpus-fast":
            client.sendall(NOISE * 100)
            for _ in range(10):
                send_descriptor(client, NOISE)
        Fake.answer(fake, client, request)

    fake.answer = answer  # type: ignore[method-assign]


@lie("monitor: urgent descriptors")
def _(fake: Fake) -> None:
    def answer(client: socket.socket, request: dict[str, Any]) -> None:
        Fake.answer(fake, client, request)
        send_descriptor(client, b"\n", socket.MSG_OOB)
        client.sendall(NOISE)

    fake.answer = answer  # type: ignore[method-assign]


@lie("stop: descriptors")
def _(fake: Fake) -> None:
    def answer(client: socket.socket, request: dict[str, Any]) -> None:
        Fake.answer(fake, client, request)
        if request["execute"] == "stop":
            client.sendall(NOISE * 100)
            for _ in range(10):
                send_descriptor(client, NOISE)

    fake.answer = answer  # type: ignore[method-assign]


@lie("monitor: false ids")
def _(fake: Fake) -> None:
    def send(client: socket.socket, message: Answer) -> None:
        Fake.send(fake, client, {**message, "id": "0"})

    fake.send = send  # type: ignore[method-assign]


@lie("monitor: escapes in every error")
def _(fake: Fake) -> None:
    def refuse(_arguments: dict[str, Any]) -> Answer:
        raise Command(ESCAPES)

    fake.replies["query-cpus-fast"] = refuse


for _command in ("query-status", "query-kvm", "query-cpus-fast", "query-memdev", "query-balloon",
                 "query-memory-devices", "query-memory-size-summary", "query-migrate"):  # fmt: skip
    LIES[f"{_command}: nested"] = instead(_command, nested(900))
    LIES[f"{_command}: text"] = instead(_command, ESCAPES)
LIES["query-status: silence"] = replying("query-status", sleep)
LIES["stop: silence"] = replying("stop", sleep)
LIES["cont: silence"] = replying("cont", sleep)
LIES["stop: keeps running"] = instead("stop", {})
LIES["query-status: changes"] = replying(
    "query-status", lambda *_: {"status": "running", "running": random.random() < 0.5}
)
LIES["query-cpus-fast: init's thread"] = lambda fake: fake.thread_ids.append(1)
LIES["query-cpus-fast: another process"] = lambda fake: fake.thread_ids.append(
    int(os.environ["BYSTANDER"])
)
LIES["query-cpus-fast: only another process"] = lambda fake: fake.thread_ids.__setitem__(
    0, int(os.environ["BYSTANDER"])
)
LIES["query-cpus-fast: main thread"] = lambda fake: fake.thread_ids.__setitem__(0, os.getpid())
LIES["query-cpus-fast: 100,000 vCPUs"] = lambda fake: fake.thread_ids.extend(range(100_000))
LIES["query-cpus-fast: huge id"] = lambda fake: fake.thread_ids.append(1 << 70)
LIES["query-cpus-fast: negative id"] = lambda fake: fake.thread_ids.append(-1)


def memory_map(change: Callable[[str], str]) -> Callable[[Fake], None]:
    def set_up(fake: Fake) -> None:
        fake.mtree = change(fake.mtree)

    return set_up


def elsewhere(address: Callable[[], int]) -> Callable[[Fake], None]:
    def set_up(fake: Fake) -> None:
        fake.hva = address()

    return set_up


def find_mapping(pattern: str) -> int:
    with open("/proc/self/maps") as maps:
        return next(int(line.split("-")[0], 16) for line in maps if re.search(pattern, line))


LIES["memory map: 2^64 bytes"] = memory_map(
    lambda text: text.replace(f"{RAM - 1:016x}", "ffffffffffffffff")
)
LIES["memory map: 1 TiB"] = memory_map(
    lambda text: text.replace(f"{RAM - 1:016x}", f"{(1 << 40) - 1:016x}")
)
LIES["memory map: 50,000 ranges"] = memory_map(
    lambda text: text.replace(
        "  00000000fee",
        "".join(
            f"  {start:016x}-{start + 4095:016x} (prio 0, ram): m{start} KVM\n"
            for start in range(1 << 33, 1 << 33 | 50_000 << 12, 4096)
        )
        + "  00000000fee",
    )
)
LIES["memory map: escapes"] = memory_map(lambda text: text.replace("pc.ram", f"p{ESCAPES[:12]}"))
LIES["RAM: libc's text"] = elsewhere(lambda: find_mapping("r-xp.*libc"))
LIES["RAM: the kernel"] = elsewhere(lambda: 0xFFFF_8000_0000_0000)
LIES["RAM: vDSO"] = elsewhere(lambda: find_mapping(r"\[vdso\]"))
LIES["RAM: address 0"] = elsewhere(lambda: 0)


@lie("stop: late")
def _(fake: Fake) -> None:
    def stop(_arguments: dict[str, Any]) -> Answer:
        time.sleep(20)
        return fake.set_running(False)

    fake.replies["stop"] = stop


# --- the process lies ---


@lie("process: endless arguments")
def _(fake: Fake) -> None:
    """Let /proc/PID/cmdline consist of 60 MiB of zeros, as the review did."""
    size = 60 * MIB
    area = mmap.mmap(-1, size)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    with open("/proc/self/stat") as file:
        stat = file.read().rpartition(")")[2].split()
    with open("/proc/self/maps") as maps:
        heap = next((line for line in maps if "[heap]" in line), "0-0 ")
    heap_start, heap_end = (int(part, 16) for part in heap.split()[0].split("-"))
    code = [int(stat[index]) for index in (23, 24)]
    stack = int(stat[25])
    fields = [code[0], code[1], heap_start - 8192, heap_start - 4096, heap_start, heap_end, stack]
    fields += [start, start + size, start, start + size, 0]  # arguments, environment, auxv
    packed = (ctypes.c_uint64 * 12)(*fields)

    class Map(ctypes.Structure):
        _fields_ = (("values", ctypes.c_uint64 * 12), ("auxv", ctypes.c_uint32),
                    ("exe", ctypes.c_uint32))  # fmt: skip

    value = Map(packed, 0, 0xFFFFFFFF)
    libc.prctl(PR_SET_MM, PR_SET_MM_MAP, ctypes.byref(value), ctypes.sizeof(value), 0)
    globals()["_kept"] = area


@lie("process: escapes in names")
def _(fake: Fake) -> None:
    libc.prctl(PR_SET_NAME, b"\x1b[2J\xff\n<0>x)", 0, 0, 0)
    threading.Thread(
        target=lambda: (libc.prctl(PR_SET_NAME, b"\xff\n) R 1 1\x07", 0, 0, 0), sleep()),
        daemon=True,
    ).start()


@lie("process: 2,000 threads")
def _(fake: Fake) -> None:
    threading.stack_size(64 << 10)
    for _ in range(2000):
        fake.wait_in_thread()


@lie("process: threads come and go")
def _(fake: Fake) -> None:
    def churn() -> None:
        while True:
            thread = threading.Thread(target=int)
            thread.start()
            thread.join()

    threading.Thread(target=churn, daemon=True).start()


@lie("process: 60,000 mappings")
def _(fake: Fake) -> None:
    split_mapping(mmap.mmap(-1, 120_000 * mmap.PAGESIZE))


def split_mapping(area: mmap.mmap) -> None:
    """Change the protection of every second page, so that the kernel needs 60,000 mappings."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for page in range(0, 60_000, 2):
        libc.mprotect(start + page * mmap.PAGESIZE, mmap.PAGESIZE, 1)
    globals()["_kept"] = area


@lie("process: 60,000 mappings of a file with a long name")
def _(fake: Fake) -> None:
    path = os.path.join(os.path.dirname(sys.argv[1]), "\N{GRINNING FACE}" * 5 + "x" * 20)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, 120_000 * mmap.PAGESIZE)
    split_mapping(mmap.mmap(fd, 120_000 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE))


@lie("process: 20 forks named qemu")
def _(fake: Fake) -> None:
    back_ram(fake)
    split_mapping(mmap.mmap(-1, 120_000 * mmap.PAGESIZE))
    reader, writer = os.pipe()
    for _ in range(20):
        if os.fork() == 0:
            os.close(writer)
            libc.prctl(PR_SET_NAME, b"qemu", 0, 0, 0)
            os.read(reader, 1)  # until the parent ends
            os._exit(0)


@lie("file system: 30,000 directories")
def _(fake: Fake) -> None:
    top = back_ram(fake)
    for number in range(30_000):
        os.mkdir(os.path.join(top, str(number)))


def back_ram(fake: Fake) -> str:
    """Map a file on tmpfs as the guest's RAM, and return the file's directory.

    The directory is removed when this process ends.
    """
    top = tempfile.mkdtemp(prefix="hostile-", dir="/dev/shm")
    remover = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", remover, top], stdin=subprocess.PIPE)
    fd = os.open(os.path.join(top, "ram"), os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, RAM)
    area = mmap.mmap(fd, RAM, flags=mmap.MAP_SHARED)
    fake.hva = ctypes.addressof(ctypes.c_char.from_buffer(area))
    globals()["_ram"] = area, process
    return top


def map_text(name: str, size: int, content: bytes = b"") -> None:
    """Map a sparse file with this name as text."""
    path = os.path.join(os.path.dirname(sys.argv[1]), name)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o755)
    os.ftruncate(fd, size)
    os.pwrite(fd, content, 0)
    globals().setdefault("_texts", []).append(
        mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC)
    )


@lie("text: sparse libc of 1.5 GiB")
def _(fake: Fake) -> None:
    map_text("libc.so.6", 1500 * MIB)


@lie("text: 200 sparse libcs")
def _(fake: Fake) -> None:
    for number in range(200):
        map_text(f"libc-{number}.so", 60 * MIB)


@lie("text: false instructions")
def _(fake: Fake) -> None:
    gadgets = b"\x0f\x05\xc3" + b"\xb8\x0f\x00\x00\x00\x0f\x05" + b"\xb8\x3c\x00\x00\x00\x0f\x05"
    map_text("libc.so.6", 4096, gadgets)


@lie("text: newlines in a path")
def _(fake: Fake) -> None:
    map_text("libc.so.6\n7f0000000000-7f0000001000 r-xp 00000000 00:00 0 \x1b[2J", 4096)


@lie("process: exits while it is attached")
def _(fake: Fake) -> None:
    fake.on_helper(lambda _: os._exit(0))


@lie("process: executes another program")
def _(fake: Fake) -> None:
    def reply(_arguments: dict[str, Any]) -> Answer:
        threading.Timer(0.05, lambda: os.execv("/bin/sleep", ["sleep", "1000"])).start()
        return []

    fake.replies["query-memdev"] = reply


@lie("process: stops itself")
def _(fake: Fake) -> None:
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGSTOP)).start()


@lie("process: is traced")
def _(fake: Fake) -> None:
    task = f"/proc/{os.getpid()}/task"
    code = (
        "import ctypes, os, sys\nlibc = ctypes.CDLL(None)\nsys.stdin.readline()\n"
        f"[libc.ptrace(0x4206, int(tid), None, None) for tid in os.listdir({task!r})]\n"
        "print(flush=True); sys.stdin.read()"
    )
    tracer = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )

    def trace() -> None:
        assert tracer.stdin is not None and tracer.stdout is not None
        tracer.stdin.write(b"\n")
        tracer.stdin.flush()
        tracer.stdout.readline()

    fake.before_listen = trace


@lie("process: no limits left")
def _(fake: Fake) -> None:
    import resource  # noqa: PLC0415

    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, 0))


# --- the descriptor lies ---


@lie("descriptors: false statistics")
def _(fake: Fake) -> None:
    """Let a file of 800 MiB look like a statistics descriptor of 2^32 counters."""
    memfd = os.memfd_create("kvm-vcpu-stats:0")
    os.ftruncate(memfd, 800 * MIB)
    os.pwrite(memfd, (0xFFFFFFFF).to_bytes(4, "little") * 6, 0)


@lie("descriptors: many vCPUs")
def _(fake: Fake) -> None:
    import resource  # noqa: PLC0415

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for _ in range(min(20_000, most - 100)):
        os.dup(fake.vcpu)


@lie("descriptors: second VM")
def _(fake: Fake) -> None:
    fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), KVM_CREATE_VM, 0)


@lie("descriptors: none")
def _(fake: Fake) -> None:
    os.close(fake.vcpu)
    os.close(fake.vm)


# --- the plugin and QEMU lie while the guest is paused ---


@lie("query-stats: always in guest mode")
def _(fake: Fake) -> None:
    LIES["plugin: all done at once"](fake)
    fake.replies["query-stats"] = lambda arguments: [
        {
            "provider": "kvm",
            "qom-path": "/machine/cpu[0]",
            "stats": [{"name": name, "value": 1} for name in arguments["providers"][0]["names"]],
        }
    ]


@lie("qom-list: 20,000 devices while the guest is paused")
def _(fake: Fake) -> None:
    LIES["plugin: all done at once"](fake)
    fake.replies["query-memdev"] = lambda _: [
        {"id": "pc.ram", "size": RAM, "merge": True, "dump": True, "prealloc": False,
         "share": False, "host-nodes": [], "policy": "default"}
    ]  # fmt: skip

    def qom_list(arguments: dict[str, Any]) -> Answer:
        if fake.running:
            return []
        if arguments["path"] == "/machine/peripheral":
            return [{"name": f"device{number}", "type": "child<x>"} for number in range(20_000)]
        time.sleep(0.05)
        return []

    fake.replies["qom-list"] = qom_list


# --- the helper lies ---


def put(address: int, data: bytes) -> None:
    """Write to this process's memory, and raise OSError if the address is not mapped."""
    os.pwrite(MEMORY, data, address)


def field_offset(name: str) -> int:
    offsets: dict[str, int] = json.loads(os.environ["CONTROL_OFFSETS"])
    return offsets[name]


def put_field(name: str, value: int) -> Callable[[Fake], None]:
    def set_up(fake: Fake) -> None:
        at = field_offset(name)
        fake.on_helper(lambda control: put(control + at, value.to_bytes(4, "little")))

    return set_up


@lie("helper: tid of another process")
def _(fake: Fake) -> None:
    put_field("tid", int(os.environ["BYSTANDER"]))(fake)


LIES["helper: never ready"] = put_field("ready", 0)
LIES["helper: ready with garbage"] = put_field("ready", 0x7FFFFFFF)
LIES["helper: batch never done"] = put_field("batch_done", 0)
LIES["helper: batch done at once"] = put_field("batch_done", 1)
LIES["helper: another signal"] = put_field("tick_signal", 9)


@lie("helper: random control page")
def _(fake: Fake) -> None:
    start = field_offset("ready")
    fake.on_helper(lambda control: put(control + start, random.randbytes(2048)))


@lie("helper: every number is the largest")
def _(fake: Fake) -> None:
    start = field_offset("ready")
    fake.on_helper(lambda control: put(control + start, b"\xff" * 2048))


@lie("helper: unmapped")
def _(fake: Fake) -> None:
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def unmap(control: int) -> None:
        libc.munmap(control, 4096)
        raise OSError

    fake.on_helper(unmap)


def helper_field(name: str, value: Callable[[], bytes]) -> Callable[[Fake], None]:
    """Write a value to the control page again and again, and keep the batch from ending."""

    def set_up(fake: Fake) -> None:
        def write(control: int) -> None:
            put(control + field_offset("batch_done"), bytes(4))
            put(control + field_offset(name), value())

        fake.on_helper(write)

    return set_up


def a_page_more() -> bytes:
    return (int(time.monotonic() * 10) % 4096 * 4096).to_bytes(8, "little")


LIES["helper: a page more each time"] = helper_field("done", a_page_more)
# A system call for 0 bytes succeeds, so the helper makes it again and again.
LIES["helper: busy without progress"] = helper_field("limits", lambda: bytes(8))


# --- the plugin lies ---

PLUGIN_STATUS = {"plugin": 1, "pre_fault_memory": True, "keeping": True, "quirk": "disabled",
                 "held": None, "vcpus": [{"id": 0}], "pending": 0,
                 "counters": {"prefaulted": 0, "again": 0, "errors": 0}}  # fmt: skip
Send = Callable[[Answer], None]
#: Replies to a batch, whose ranges are triples of the kind, the start and the size.
Work = Callable[[Send, list[tuple[int, ...]]], None]


def no_reply(_send: Send, _ranges: Answer = None) -> None:
    sleep()


def plugin(
    work: Work = no_reply,
    status: Callable[[Send], None] = lambda send: send(PLUGIN_STATUS),
    other: Callable[[Send], None] = lambda send: send({"ok": True}),
) -> Callable[[Fake], None]:
    """Pose as the plugin.

    The parameters reply to a batch, to ``status`` and to other requests.
    """

    def serve(listener: socket.socket) -> None:
        libc.prctl(PR_SET_NAME, f"prefault/{listener.fileno()}".encode(), 0, 0, 0)
        while True:
            client, _ = listener.accept()
            threading.Thread(target=converse, args=(client,), daemon=True).start()

    def converse(client: socket.socket) -> None:
        def send(message: Answer) -> None:
            text = message if isinstance(message, str) else json.dumps(message) + "\n"
            client.sendall(text.encode())

        with contextlib.suppress(OSError), client, client.makefile("r") as requests:
            for line in requests:
                words = line.split()
                if words[0] == "status":
                    status(send)
                elif words[0] in ("work", "work-lent"):
                    lines = [requests.readline().split() for _ in range(int(words[1]))]
                    send({"ok": True})
                    work(send, [tuple(map(int, words[1:])) for words in lines])
                else:
                    other(send)

    def set_up(fake: Fake) -> None:
        def listen() -> None:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"{fake.path}.plugin")
            listener.listen(8)
            threading.Thread(target=serve, args=(listener,), daemon=True).start()

        fake.before_listen = listen

    return set_up


def repeatedly(message: Callable[[int], Answer], seconds: float) -> Work:
    """Send messages until the connection is closed, at an interval in seconds."""

    def send_all(send: Send, _ranges: Answer) -> None:
        number = 0
        while True:
            number += 1
            send(message(number))
            time.sleep(seconds)

    return send_all


def delayed(message: Answer, seconds: float) -> Callable[[Send], None]:
    def send_late(send: Send) -> None:
        time.sleep(seconds)
        send(message)

    return send_late


def ending(
    done: Callable[[int], list[int]], *, only_prefault: bool = False, seconds: float = 0
) -> Work:
    """End each batch.

    :param done: Returns the completed bytes and the errno of a range of this size.
    :param only_prefault: Whether the plugin is honest about populating.
    :param seconds: The time after which a batch ends, unless the plugin is honest.
    """

    def end(send: Send, ranges: list[tuple[int, ...]]) -> None:
        if only_prefault and ranges[0][0] == 0:
            for _, start, size in ranges:
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), POPULATE_WRITE)
            send({"done": [[size, 0] for _, _, size in ranges], "seconds": 0.01})
        else:
            time.sleep(seconds)
            send({"done": [done(size) for _, _, size in ranges], "seconds": 0.01})

    return end


def busy_thread(_send: Send, _ranges: Answer) -> None:
    """Keep a thread busy that has the name of a batch's thread."""
    libc.prctl(PR_SET_NAME, b"prefault-batch", 0, 0, 0)
    while True:
        pass


LIES["plugin: silent about a batch"] = plugin()
LIES["plugin: a byte more each time"] = plugin(repeatedly(lambda n: {"progress": n}, 0.1))
LIES["plugin: progress to and fro"] = plugin(
    repeatedly(lambda n: {"progress": n % 2 * 8 * MIB}, 0.1)
)
LIES["plugin: busy thread"] = plugin(busy_thread)
LIES["plugin: endless replies to a batch"] = plugin(repeatedly(lambda _: {"x": []}, 0))
LIES["plugin: half a reply to a batch"] = plugin(lambda send, _: send('{"done":'))
LIES["plugin: all done at once"] = plugin(ending(lambda size: [size, 0]))
LIES["plugin: nothing done"] = plugin(ending(lambda _: [0, 0]))
LIES["plugin: nothing prefaulted"] = plugin(ending(lambda _: [0, 0], only_prefault=True))
LIES["plugin: always aborted"] = plugin(
    ending(lambda _: [0, errno.ECANCELED], only_prefault=True, seconds=0.3)
)
LIES["plugin: a page for each batch"] = plugin(ending(lambda _: [4096, 0]))
LIES["plugin: every page is faulty"] = plugin(ending(lambda _: [0, errno.EFAULT]))
LIES["plugin: silence"] = plugin(status=no_reply)
LIES["plugin: late status"] = plugin(status=delayed(PLUGIN_STATUS, 4.5))
LIES["plugin: nested status"] = plugin(
    status=lambda send: send('{"plugin":1,"vcpus":' + "[" * 100_000 + "\n")
)
LIES["plugin: escapes in an error"] = plugin(other=lambda send: send({"error": ESCAPES}))


# --- the jobs of a patched QEMU lie ---


def jobs(
    progress: Callable[[], int], status: str = "running", *, events: bool = False, orphans: int = 0
) -> Callable[[Fake], None]:
    """Pose as a QEMU with ``x-kvm-prefault-memory``, whose job processes no memory.

    :param progress: Returns the job's progress in bytes.
    :param status: The job's status.
    :param events: Whether to send events about another job without end.
    :param orphans: The number of jobs of qemu-prefault processes that have exited.
    """
    namespace = os.stat("/proc/self/ns/pid").st_ino
    old = [f"qemu-prefault-{namespace}-{(1 << 22) + number}-0" for number in range(orphans)]

    def set_up(fake: Fake) -> None:
        ids: list[str] = list(old)
        ranges: list[dict[str, int]] = []

        def start(arguments: dict[str, Any]) -> Answer:
            ids.append(arguments["job-id"])
            ranges[:] = [
                {"start": each["start"], "size": each["size"], "mapped": 0, "populated": 0,
                 "absent": 0}
                for each in arguments["ranges"]
            ]  # fmt: skip
            return {}

        fake.replies |= {
            "x-query-kvm-prefault": lambda _: {"ranges": ranges},
            "x-kvm-prefault-memory": start,
            "query-jobs": lambda _: [
                {"id": id_, "type": "kvm-prefault", "status": status,
                 "current-progress": progress(), "total-progress": RAM}
                for id_ in ids
            ],
            "job-cancel": lambda _: {},
            "job-dismiss": lambda _: {},
        }  # fmt: skip
        if events:
            honest = fake.answer
            event = {"event": "JOB_STATUS_CHANGE", "data": {"id": "other", "status": "running"},
                     "timestamp": {"seconds": 0, "microseconds": 0}}  # fmt: skip

            def flood(client: socket.socket) -> None:
                with contextlib.suppress(OSError):
                    while True:
                        fake.send(client, event)
                        time.sleep(0.001)

            def answer(client: socket.socket, request: dict[str, Any]) -> None:
                honest(client, request)
                if request["execute"] == "x-kvm-prefault-memory":
                    threading.Thread(target=flood, args=(client,), daemon=True).start()

            fake.answer = answer  # type: ignore[method-assign]

    return set_up


LIES["job: no progress"] = jobs(lambda: 0)
LIES["job: a byte more each time"] = jobs(lambda: int(time.monotonic() * 10) % RAM)
LIES["job: ends without progress"] = jobs(lambda: 0, "concluded")
LIES["job: endless events"] = jobs(lambda: 0, events=True)
LIES["job: 1,000 old jobs that never end"] = jobs(lambda: 0, orphans=1000)


def main() -> None:
    fake = Fake(sys.argv[1])
    LIES[sys.argv[2]](fake)
    os.setgroups([])
    os.setresgid(OTHER_USER, OTHER_USER, OTHER_USER)
    os.setresuid(OTHER_USER, OTHER_USER, OTHER_USER)
    fake.before_listen()
    fake.listen()
    print(os.getpid(), flush=True)
    fake.serve()


if __name__ == "__main__":
    main()
