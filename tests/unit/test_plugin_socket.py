# SPDX-License-Identifier: GPL-2.0-or-later
"""Test how the tool finds the plugin's control socket while other users attack.

The plugin's own code serves the socket, and the attackers run as uid 65534.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qemu_prefault.agents import plugin_control
from qemu_prefault.agents.plugin import Control, find_control_socket
from qemu_prefault.agents.plugin_socket import bound_paths, connect, diagnose_path
from qemu_prefault.errors import FailedError, QemuPrefaultError
from qemu_prefault.host import kvm
from qemu_prefault.host.inside_root import open_inside, reopened
from qemu_prefault.host.procfs import Process
from support.native import link_with_plugin

OTHER_USER = 65534
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can start another user")

#: Create sockets whose names forge lines of /proc/net/unix, and sockets with odd names. Report
#: the bytes that clients send to the forged paths. The arguments are a directory, the inode of the
#: plugin's socket, and the number of sockets.
ATTACKER = r"""
import os, resource, socket, sys
directory, inode, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (count + 64, max(count + 64, resource.getrlimit(7)[1])))
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
os.chdir(directory)
evil = socket.socket(socket.AF_UNIX)
evil.bind(directory + "/e")
evil.listen(4096)
evil.setblocking(False)
row = f"\n0000000000000000: 00000002 00000000 00010000 0001 01 {inode} {directory}"
os.makedirs(row.encode())
kept = []
for i in range(count):
    kept.append(socket.socket(socket.AF_UNIX))
    if i % 3 == 0:
        os.link("e", f"e{i}")
        kept[-1].bind(f"{row}/e{i}")
    elif i % 3 == 1:
        kept[-1].bind(b"caf\xe9\n\x1b]0;%d" % i)
    else:
        kept[-1].bind(b"\0caf\xe9\n%d" % i)
print("ready", flush=True)
sys.stdin.readline()
received = connections = 0
while True:
    try:
        client = evil.accept()[0]
    except BlockingIOError:
        break
    connections += 1
    received += len(client.recv(100))
print(connections, received, flush=True)
"""


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """Return a directory in which every user can create files."""
    directory = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    directory.chmod(0o1777)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def program(public: Path) -> Path:
    source = Path(__file__).with_name("plugin_socket.c")
    return link_with_plugin(source, public / "serve", "-DPF_IDLE_SECONDS=1")


def start(
    program: Path, path: Path | str, *prefix: str, **options: object
) -> subprocess.Popen[str]:
    """Start the plugin's control socket, and wait until it listens."""
    process = subprocess.Popen(
        [*prefix, program, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    assert process.stdout and process.stdout.readline()
    return process  # type: ignore[no-any-return]


def stop(process: subprocess.Popen[str], text: str = "") -> str:
    """Close a program's stdin, and return the rest of its output."""
    return process.communicate(text, timeout=60)[0] or ""


class Server(NamedTuple):
    """A running program that serves the plugin's control socket."""

    path: Path
    pid: int


async def status_of(path: Path, process: Process | int) -> dict[str, Any]:
    """Return the plugin's status as the tool reads it."""
    async with Control.open(path, process) as control:
        return await control.status()


def inode_of_listener(pid: int) -> int:
    """Return the inode of a process's first listening socket."""
    for fd in sorted(map(int, os.listdir(f"/proc/{pid}/fd"))):
        link = os.readlink(f"/proc/{pid}/fd/{fd}")
        if link.startswith("socket:"):
            return int(link[8:-1])
    raise AssertionError("the process has no socket")


@needs_root
@pytest.mark.parametrize("network", ["same", "other"])
def test_sockets_of_other_users_have_no_effect(program: Path, public: Path, network: str) -> None:
    """Check the search with 10,000 sockets, by sock_diag and (other) by /proc/PID/net/unix."""
    path = public / f"{network}.sock"
    server = start(program, path, *(["unshare", "--net"] if network == "other" else []))
    directory = Path(tempfile.mkdtemp(prefix="n", dir="/tmp"))
    os.chown(directory, OTHER_USER, OTHER_USER)
    prefix = ["nsenter", "-t", str(server.pid), "--net"] if network == "other" else []
    attacker = subprocess.Popen(
        [*prefix, sys.executable, "-c", ATTACKER, directory, str(inode_of_listener(server.pid)),
         "10000"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert attacker.stdout and attacker.stdout.readline() == "ready\n"
        process = Process.find(server.pid)
        table = Path(f"/proc/{server.pid}/net/unix").read_bytes()
        assert len(bound_paths(table, inode_of_listener(server.pid))) > 1000
        before = time.process_time()
        found = find_control_socket(process)
        assert found == path

        assert len(asyncio.run(status_of(found, process))["vcpus"]) == 1
        assert time.process_time() - before < 2
        connections, received = stop(attacker, "\n").split()
        assert int(received) == 0
        if network == "same":
            assert int(connections) == 0
    finally:
        attacker.kill()
        stop(server)
        shutil.rmtree(directory)


def test_foreign_listener_is_refused_before_a_request(program: Path, tmp_path: Path) -> None:
    """Check that the tool sends nothing to a socket on which another process listens."""
    server = start(program, tmp_path / "control")
    try:
        with socket.socket(socket.AF_UNIX) as impostor:
            impostor.bind(str(tmp_path / "impostor"))
            impostor.listen()

            with pytest.raises(FailedError, match="listens on it") as caught:
                asyncio.run(status_of(tmp_path / "impostor", server.pid))
            assert caught.value.code == "control-socket"
            impostor.settimeout(20)
            assert impostor.accept()[0].recv(100) == b""
    finally:
        stop(server)


def test_socket_of_exited_listener_is_refused(tmp_path: Path) -> None:
    """Check that a process which inherits a socket does not count as its listener."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control"))
        child = os.fork()
        if child == 0:
            listener.listen()
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(FailedError, match="listens on it"):
            connect(tmp_path / "control", Process.find(os.getpid()))


def test_full_backlog_is_an_error_within_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_control, "ANSWER_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        listener.bind(str(tmp_path / "control"))
        listener.listen(0)
        other.connect(str(tmp_path / "control"))
        with pytest.raises(FailedError, match="did not accept") as caught:
            asyncio.run(Control.connect(tmp_path / "control", os.getpid()))
        assert caught.value.code == "control-socket"


def test_diagnosis_of_sockets(tmp_path: Path) -> None:
    def path_of(name: str | bytes | None) -> bytes | None:
        with socket.socket(socket.AF_UNIX) as found:
            if name is not None:
                found.bind(name)
            return diagnose_path(os.fstat(found.fileno()).st_ino)

    odd = os.fsencode(tmp_path) + b"/caf\xe9\n0: 0"
    assert path_of(odd) == odd
    assert path_of(b"\0abstract") is None
    assert path_of(None) is None
    with pytest.raises(OSError):
        diagnose_path(0xFFFFFFF0)


#: Enter the root directory in the first argument as another user. Then run the code in the second
#: argument, and wait for the end of stdin.
CHROOT = """
import ctypes, os, socket, sys
os.chroot(sys.argv[1])
os.chdir("/")
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
libc = ctypes.CDLL(None)
libc.prctl(4, 1, 0, 0, 0)
exec(sys.argv[2])
print("ready", flush=True)
sys.stdin.read()
"""


class Chroot:
    """A process of another user with its own root directory."""

    def __init__(self, root: Path, code: str = "") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHROOT, root, code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout
        assert self._process.stdout.readline() == "ready\n"
        self.process = Process.find(self._process.pid)

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture
def chroot(tmp_path: Path) -> Iterator[tuple[Path, Process]]:
    if os.getuid() != 0:
        pytest.skip("only root can call chroot(2)")
    root = tmp_path / "root"
    (root / "dev").mkdir(parents=True)
    child = Chroot(root)
    yield root, child.process
    child.close()


@pytest.mark.parametrize("target", ["absolute", "parent", "magic", "cwd"])
def test_socket_path_stays_in_root(
    chroot: tuple[Path, Process], tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that no path leads to a socket outside the root directory of QEMU."""
    root, process = chroot
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as host:
        host.bind(str(tmp_path / "host"))
        host.listen()
        host.setblocking(False)
        path = "/control"
        if target == "absolute":
            (root / "control").symlink_to(tmp_path / "host")
        elif target == "parent":
            (root / "control").symlink_to("../host")
        elif target == "magic":
            (root / "control").symlink_to(f"/proc/{os.getpid()}/root{tmp_path}/host")
        else:
            path = "host"
        with pytest.raises(QemuPrefaultError, match="cannot connect"):
            connect(path, process)
        with pytest.raises(BlockingIOError):
            host.accept()


#: Play the plugin, and then replace the control socket by a link to the path in "{}".
REPLACE_SOCKET = """
listener = socket.socket(socket.AF_UNIX)
listener.bind("/control")
listener.listen()
libc.prctl(15, b"prefault/%d" % listener.fileno(), 0, 0, 0)
os.rename("/control", "/old")
os.symlink({!r}, "/control")
"""


@needs_root
def test_replaced_socket_does_not_reach_a_daemon_of_root(tmp_path: Path) -> None:
    """Check that a QEMU cannot send root's requests to a socket that only root can open."""
    root = tmp_path / "root"
    root.mkdir()
    os.chown(root, OTHER_USER, OTHER_USER)
    with socket.socket(socket.AF_UNIX) as host:
        host.bind(str(tmp_path / "host"))
        (tmp_path / "host").chmod(0o600)
        host.listen()
        host.setblocking(False)
        child = Chroot(root, REPLACE_SOCKET.format(str(tmp_path / "host")))
        try:
            found = find_control_socket(child.process)
            with pytest.raises(QemuPrefaultError, match="cannot connect"):
                asyncio.run(status_of(found or Path("/control"), child.process))
            with pytest.raises(BlockingIOError):
                host.accept()
        finally:
            child.close()


def test_other_types_of_files_are_refused(chroot: tuple[Path, Process]) -> None:
    root, process = chroot
    (root / "control").write_text("")
    with pytest.raises(FailedError, match="non-socket"):
        connect("/control", process)


def test_only_the_kvm_device_is_opened(chroot: tuple[Path, Process]) -> None:
    """Check that no other device is opened, because opening it could have an effect."""
    root, process = chroot
    device = root / "dev/kvm"
    os.mkfifo(device)
    with pytest.raises(OSError, match="not the KVM device"):
        kvm._open_kvm(process)
    device.unlink()
    os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    with pytest.raises(OSError, match="not the KVM device"):
        kvm._open_kvm(process)
    device.unlink()
    device.symlink_to("/dev/null")  # a device outside the root directory
    with pytest.raises(FileNotFoundError):
        kvm._open_kvm(process)
    device.unlink()
    os.mknod(device, 0o600 | stat.S_IFCHR, kvm.KVM_DEVICE)
    with open_inside(process, "/dev/kvm") as found:
        assert os.stat(reopened(found)).st_rdev == kvm.KVM_DEVICE


# --- the plugin's side ---


def ask(path: Path, text: bytes = b"status\n") -> bytes:
    """Send a request, and return the first bytes of the reply."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        try:
            client.sendall(text)
            return client.recv(100)
        except (BrokenPipeError, ConnectionResetError):
            return b""


def test_socket_option_keeps_other_files(program: Path, tmp_path: Path) -> None:
    """Check that the plugin removes neither a file nor the socket of a living process."""
    file = tmp_path / "precious.conf"
    file.write_text("precious")
    stop(start(program, file))
    assert file.read_text() == "precious"
    link = tmp_path / "link"
    link.symlink_to(file)
    stop(start(program, link))
    assert link.is_symlink() and file.read_text() == "precious"
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(tmp_path / "living"))
        living.listen()
        stop(start(program, tmp_path / "living"))
        assert (tmp_path / "living").is_socket()


def test_stale_socket_is_replaced_and_removed(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "control"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    server = start(program, path)
    assert ask(path).startswith(b'{"plugin":1')
    stop(server)
    assert not path.exists()


@needs_root
def test_stale_socket_of_another_user_is_kept(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "control"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    os.chown(path, OTHER_USER, OTHER_USER)
    stop(start(program, path))
    assert path.is_socket()


def test_exit_keeps_a_replacement(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "control"
    server = start(program, path)
    path.unlink()
    path.write_text("new")
    stop(server)
    assert path.read_text() == "new"


@needs_root
@pytest.mark.parametrize("taken", [False, True])
def test_default_directory_is_private(program: Path, public: Path, taken: bool) -> None:
    """Check that another user cannot take the name of the directory first."""
    user = 60001 + taken
    name = public / f"qemu-prefault-{user}"
    if taken:
        name.mkdir()
        os.chown(name, OTHER_USER, OTHER_USER)
        name.chmod(0o777)
    environment = {"TMPDIR": str(public), "XDG_RUNTIME_DIR": ""}
    with tempfile.TemporaryFile("w+") as errors:
        server = start(
            program, "", user=user, group=user, extra_groups=[], env=environment, stderr=errors
        )
        try:
            found = find_control_socket(Process.find(server.pid))
            assert found is not None
            status = found.parent.lstat()
            assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (user, 0o700)
            assert (found.parent == name) is not taken
            assert ask(found).startswith(b'{"plugin":1')
        finally:
            stop(server)
        errors.seek(0)
        assert (str(name) in errors.read()) is taken


@pytest.fixture
def server_of_other_user(program: Path, public: Path) -> Iterator[Server]:
    path = public / "other-user.sock"
    server = start(program, path, user=OTHER_USER, group=OTHER_USER, extra_groups=[])
    yield Server(path, server.pid)
    stop(server)


#: Become the user in the second argument, because other users cannot execute root's Python.
BECOME = """
import os, socket, sys, time
user = int(sys.argv[2])
os.setgroups([])
os.setresgid(user, user, user)
os.setresuid(user, user, user)
"""
#: Keep as many connections to a socket as possible.
CLIENTS = f"""{BECOME}
clients = [socket.socket(socket.AF_UNIX) for _ in range(40)]
for client in clients:
    client.connect(sys.argv[1])
print("ready", flush=True)
while True:
    for client in clients:
        try:
            client.send(b"unknown\\n")
        except OSError:
            pass
    time.sleep(0.1)
"""


@needs_root
def test_clients_of_another_user_leave_a_place_for_root(server_of_other_user: Server) -> None:
    """Check that root can connect while QEMU's user holds as many connections as possible."""
    with subprocess.Popen(
        [sys.executable, "-c", CLIENTS, server_of_other_user.path, str(OTHER_USER)],
        stdout=subprocess.PIPE,
        text=True,
    ) as clients:
        try:
            assert clients.stdout and clients.stdout.readline() == "ready\n"
            asyncio.run(status_of(server_of_other_user.path, server_of_other_user.pid))
        finally:
            clients.kill()


def test_idle_client_is_disconnected(program: Path, tmp_path: Path) -> None:
    """Check the idle limit, which is one second in this program."""
    server = start(program, tmp_path / "control")
    try:
        assert ask(tmp_path / "control", b"stat") == b""
    finally:
        stop(server)


ONE_CLIENT = f"""{BECOME}
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
client.sendall(b"status\\n")
print(client.recv(10))
"""
#: Change to the only user of this user namespace, and execute a program.
AS_ONLY_USER = """
import ctypes, os, sys
CLONE_NEWUSER = 0x10000000
print(ctypes.CDLL(None).unshare(CLONE_NEWUSER), flush=True)
os.read(0, 1)
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
os.execv(sys.argv[1], sys.argv[1:])
"""


@needs_root
def test_user_without_id_is_not_the_overflow_user(program: Path, public: Path) -> None:
    """Check that a user whom the kernel reports as 65534 is refused, unless he is that user."""
    user, path = 60100, public / "mapped.sock"
    server = subprocess.Popen(
        [sys.executable, "-c", AS_ONLY_USER, program, path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdin and server.stdout
        if server.stdout.readline() != "0\n":
            pytest.skip("this kernel refuses user namespaces")
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{server.pid}/{name}").write_text(f"{OTHER_USER} {user} 1")
        server.stdin.write("\n")
        server.stdin.flush()
        server.stdout.readline()
        assert path.stat().st_uid == user
        assert ask(path) == b""  # root of the host has no id in the namespace
        own = subprocess.run(
            [sys.executable, "-c", ONE_CLIENT, path, str(user)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "plugin" in own.stdout
    finally:
        stop(server)
