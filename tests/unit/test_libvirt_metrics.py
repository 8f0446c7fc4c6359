# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that a hostile domain or client cannot take the metrics of other domains away."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qemu_prefault.errors import InputError
from qemu_prefault.libvirt import http, metrics, sampler
from qemu_prefault.libvirt.find_qemu import find_qemu
from qemu_prefault.libvirt.metrics import Metrics
from qemu_prefault_lab.wait import wait_for
from support.hostile_plugin import REPLIES

PROGRAM = Path(__file__).parents[1] / "support" / "hostile_plugin.py"
#: Margin for a busy host, in seconds.
SLOW = 3.0
HOSTILE = [*sorted(REPLIES.keys() - {"honest"}), "closes", "descriptors", "endless",
           "single bytes"]  # fmt: skip


class Watched:
    """The attributes of the daemon that :class:`Metrics` uses."""

    def __init__(self) -> None:
        self.running: dict[str, str] = {}
        self.connected = True
        self.on_run: list[Callable[..., None]] = []


class Host:
    """Starts domains, as libvirt's pid files and processes represent them."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self._pid_files = directory / "libvirt" / "qemu" / "run"
        self._pid_files.mkdir(parents=True)
        self.daemon = Watched()
        self.metrics = Metrics(self.daemon)

    def start(self, name: str, behaviour: str) -> subprocess.Popen[bytes]:
        uuid = f"{len(self.daemon.running):08}-8f0b-4f63-a3a5-0c8d0f5c8d11"
        child = subprocess.Popen(
            [sys.executable, PROGRAM, uuid, self._directory / f"{name}.sock", behaviour],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(PROGRAM.parents[1])},
        )
        self._stack.callback(child.wait)
        self._stack.callback(child.kill)
        assert child.stdout is not None
        assert child.stdout.readline() == b"\n"
        (self._pid_files / f"{name}.pid").write_text(f"{child.pid}\n")
        self.daemon.running[uuid] = name
        return child

    def listen(self) -> int:
        """Serve the metrics, and return the port."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = int(free.getsockname()[1])
        self.metrics.listen(f":{port}")
        return port


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with contextlib.ExitStack() as stack:
        yield Host(tmp_path, stack)


def scrape(port: int, timeout: float = 10) -> dict[tuple[str, str], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=timeout) as answer:
        return values(answer.read().decode())


def values(text: str) -> dict[tuple[str, str], float]:
    return {
        (sample.name, sample.labels.get("domain", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def assert_complete(found: dict[tuple[str, str], float], name: str) -> None:
    assert found["qemu_prefault_domain_up", name] == 1
    assert found["qemu_prefault_plugin", name] == 1
    assert found["qemu_prefault_plugin_pending_bytes", name] == 7
    assert found["qemu_prefault_plugin_prefaulted_bytes_total", name] == 4096
    assert found["qemu_prefault_plugin_again_bytes_total", name] == 8192
    assert found["qemu_prefault_plugin_errors_total", name] == 3


# --- hostile domains ---


def test_hostile_domains_lose_only_their_own_metrics(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """Ask all hostile domains at once, between two honest ones."""
    host.start("first", "honest")
    for number, behaviour in enumerate(HOSTILE):
        host.start(f"hostile{number}", behaviour)
    host.start("named", "thread name")
    host.start("last", "honest")
    port = host.listen()
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        found = scrape(port)
    took = time.monotonic() - started
    assert took < sampler.DEADLINE + SLOW
    for name in ("first", "last", "named"):
        assert_complete(found, name)
    for number, behaviour in enumerate(HOSTILE):
        assert found["qemu_prefault_domain_up", f"hostile{number}"] == 0, behaviour
        assert ("qemu_prefault_plugin_pending_bytes", f"hostile{number}") not in found, behaviour
    incomplete = [r.getMessage() for r in caplog.records if "incomplete" in r.getMessage()]
    assert len(incomplete) == len(HOSTILE)


def test_silent_domains_are_asked_at_once(host: Host) -> None:
    host.start("honest", "honest")
    for number in range(8):
        host.start(f"silent{number}", "nothing")
    started = time.monotonic()
    samples = {
        sample.name: sample for sample in sampler.Sampler(lambda: host.daemon.running).samples()
    }
    assert time.monotonic() - started < sampler.DEADLINE + SLOW
    assert samples["honest"].plugin is not None and not samples["honest"].problem
    assert all(samples[f"silent{number}"].problem for number in range(8))


def test_blocked_reader_gets_no_second_thread(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block a thread like a read of /proc that returns when QEMU wants."""
    host.start("honest", "honest")
    uuid = "blocked"
    host.daemon.running[uuid] = "blocked"
    blocked = threading.Event()

    def find(name: str, uuid: str) -> Any:
        if name == "blocked":
            blocked.wait()
        return find_qemu(name, uuid)

    monkeypatch.setattr(sampler, "find_qemu", find)
    monkeypatch.setattr(sampler, "INTERVAL", 0.0)
    monkeypatch.setattr(sampler, "DEADLINE", 2.0)
    reader = sampler.Sampler(lambda: host.daemon.running)
    try:
        before = threading.active_count()
        for _ in range(3):
            found = {sample.name: sample for sample in reader.samples()}
            assert found["blocked"].problem
        assert threading.active_count() <= before + 1
        assert not found["honest"].problem
    finally:
        blocked.set()


def test_parallel_scrapes_share_one_collection(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.start("slow", "honest after a while")
    asked = []

    def find(name: str, uuid: str) -> Any:
        asked.append(name)
        return find_qemu(name, uuid)

    monkeypatch.setattr(sampler, "find_qemu", find)
    port = host.listen()
    with ThreadPoolExecutor(16) as executor:
        found = list(executor.map(lambda _: scrape(port), range(16)))
    assert asked == ["slow"]
    for each in found:
        assert_complete(each, "slow")


def test_domain_that_ends_is_no_failure(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    child = host.start("ends", "honest")
    reader = sampler.Sampler(lambda: host.daemon.running)
    child.kill()
    child.wait()
    host.daemon.running.clear()
    assert reader.samples() == []
    assert caplog.records == []


def test_two_domains_with_one_name_do_not_break_the_format(host: Host) -> None:
    host.start("same", "honest")
    host.daemon.running["other"] = "same"
    text = host.metrics._client.generate_latest(host.metrics.registry).decode()
    assert text.count('qemu_prefault_domain_up{domain="same"}') == 1


def test_reused_pid_is_not_the_domain(host: Host) -> None:
    """Start a process with the domain's UUID in its command line, after the pid file's QEMU."""
    host.start("stale", "honest")
    (path,) = host._pid_files.glob("*.pid")
    an_hour_ago = time.time() - 3600
    os.utime(path, (an_hour_ago, an_hour_ago))
    (sample,) = sampler.Sampler(lambda: host.daemon.running).samples()
    assert "younger than the file" in sample.problem


def test_pid_file_that_another_process_locks(host: Host) -> None:
    child = host.start("locked", "honest")
    (path,) = host._pid_files.glob("*.pid")
    program = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'r+')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX, 1)\nprint(flush=True)\nsys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == b"\n"
        (sample,) = sampler.Sampler(lambda: host.daemon.running).samples()
        assert f"process {holder.pid} has locked it" in sample.problem
        assert child.poll() is None
        assert holder.stdin is not None
        holder.stdin.close()


def test_pid_file_is_no_symbolic_link(host: Host, tmp_path: Path) -> None:
    host.start("linked", "honest")
    (path,) = host._pid_files.glob("*.pid")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    (sample,) = sampler.Sampler(lambda: host.daemon.running).samples()
    assert "symbolic links" in sample.problem


# --- the metrics file ---


def test_textfile_writer_survives_every_error(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.start("honest", "honest")
    host.start("hostile", "brackets")
    monkeypatch.setattr(metrics, "TEXTFILE_SECONDS", 0.1)
    path = tmp_path / "files" / "qemu-prefault.prom"
    failing = threading.Event()
    failing.set()

    def broken() -> dict[str, str]:
        if failing.is_set():
            raise RecursionError
        return host.daemon.running

    host.metrics._sampler = sampler.Sampler(broken)
    with host.metrics.kept_in(path):
        path.parent.mkdir()  # the first write fails
        failing.clear()
        wait_for(path.exists, "the file exists")
        assert_complete(values(path.read_text()), "honest")
        assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == []


def test_textfile_does_not_follow_links(host: Host, tmp_path: Path) -> None:
    """Let the directory's owner guess the name of the temporary file."""
    target = tmp_path / "target"
    target.write_text("precious")
    path = tmp_path / "files" / "qemu-prefault.prom"
    path.parent.mkdir()
    path.symlink_to(target)
    for thread in range(64):
        for pid in (os.getpid(), os.getpid() + 1):
            ident = threading.get_ident() + thread
            (path.parent / f"{path.name}.{pid}.{ident}").symlink_to(target)
    assert host.metrics._write(path) == ""
    assert target.read_text() == "precious"
    assert not path.is_symlink()


# --- the listener ---


def test_idle_connections_do_not_stop_a_scrape(host: Host) -> None:
    host.start("honest", "honest")
    port = host.listen()
    scrape(port)
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        started = time.monotonic()
        assert_complete(scrape(port), "honest")
        assert time.monotonic() - started < SLOW
        assert threading.active_count() <= before + http.REQUESTS
        descriptors = len(os.listdir("/proc/self/fd"))
        assert descriptors < 400 + http.CONNECTIONS + 100


def test_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    monkeypatch.setattr(http, "REQUEST_SECONDS", 0.2)
    port = host.listen()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as idle:
        idle.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        assert idle.recv(100) == b""


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\n\r\n", b"200"),
        (b"HEAD /metrics HTTP/1.0\r\n\r\n", b"200"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405"),
        (b"GET /metrics\r\n\r\n", b"400"),
        (b"\xff\x00\x1b[2J\r\n\r\n", b"400"),
        (b"GET /metrics?name[]=\xff HTTP/1.1\r\nAccept: \x00\r\n\r\n", b"200"),
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", b""),
    ],
    ids=["get", "head", "post", "short", "garbage", "query", "long"],
)
def test_requests(host: Host, request_bytes: bytes, status: bytes) -> None:
    port = host.listen()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        answer = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            client.sendall(request_bytes)
            while data := client.recv(65536):
                answer += data
    assert answer.partition(b"\r\n")[0].split(b" ")[1:2] == ([status] if status else [])
    scrape(port)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (":9469", ("127.0.0.1", 9469)),
        ("0.0.0.0:9469", ("0.0.0.0", 9469)),
        ("[::]:9469", ("::", 9469)),
        ("[::1]:80", ("::1", 80)),
        ("localhost:1", ("localhost", 1)),
    ],
)
def test_address(address: str, expected: tuple[str, int]) -> None:
    assert http.parse_address(address) == expected


@pytest.mark.parametrize("address", ["", ":", "9469", "x", ":0", ":65536", ":٣", ":-1", "::"])
def test_malformed_address(address: str) -> None:
    with pytest.raises(InputError):
        http.parse_address(address)


@pytest.mark.parametrize("host_name", ["", "0", "0x0", "0.0", "00.0.0.0"])
def test_only_a_written_address_listens_beyond_this_host(host_name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    try:
        with http.bind(f"{host_name}:{port}") as listener:
            assert listener.getsockname()[0] == "127.0.0.1"
    except InputError as error:
        assert host_name and "0.0.0.0:PORT" in error.remedy
