# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines whose KVM can prefault: the nested lab's L1, or this host.

Both kinds of machine have the same methods to run commands, copy files and install wheels, so the
demo, the benchmarks and the tests work on either kind.
"""

from __future__ import annotations

import abc
import contextlib
import fcntl
import importlib.util
import io
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Final

import qemu_prefault
from qemu_prefault.errors import UnsupportedError

from . import image
from .errors import RemoteCommandError, RemoteTimeoutError
from .guest import L2_VARIABLE

#: A callback for a running command's output. It gets the stream (1 stdout, 2 stderr) and the bytes.
OnOutput = Callable[[int, bytes], None]

#: Seconds between SIGTERM and SIGKILL when a command exceeds its time limit.
GRACE_SECONDS = 5.0

_KVM_CHECK_EXTENSION = 0xAE03
_KVM_CAP_PRE_FAULT_MEMORY = 236


@dataclass(frozen=True)
class Invocation:
    """A command to run, with the arguments of :meth:`Machine.run`.

    :ivar timeout: The time limit in seconds.
    :ivar env: Variables to add to the machine's environment.
    """

    argv: tuple[str, ...]
    timeout: float
    env: Mapping[str, str]
    cwd: str | None
    stdin: BinaryIO


@dataclass(frozen=True)
class Completed:
    """A command that has exited.

    If a signal killed the command, ``returncode`` is the negative signal number.
    """

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def text(self) -> str:
        """The command's stdout as text."""
        return self.stdout.decode(errors="replace")

    @property
    def error_text(self) -> str:
        """The command's stderr as text."""
        return self.stderr.decode(errors="replace")


class Machine(abc.ABC):
    """A virtual machine or host on which root can run KVM tests."""

    #: The directory with the L2 guests' kernel and initramfs on that machine.
    l2_directory: str

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abc.abstractmethod
    def close(self) -> None:
        """Release the machine."""

    @abc.abstractmethod
    def _execute(self, command: Invocation, sink: OnOutput) -> tuple[int, bool]:
        """Run a command and return its exit code and whether it exceeded its time limit."""

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        timeout: float = 600.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: bytes | BinaryIO | None = None,
        stdout: BinaryIO | None = None,
        on_output: OnOutput | None = None,
    ) -> Completed:
        """Run a command until it exits.

        Several threads may call this method concurrently.

        :param timeout: Seconds after which the command and its process group are killed.
        :param check: Raise RemoteCommandError if the exit code is not 0.
        :param env: Variables to add to the machine's environment.
        :param stdin: The command's stdin. None means an empty input.
        :param stdout: A file that receives the command's stdout instead of ``Completed.stdout``.
        :param on_output: A function that is called with the output while the command runs.
        :raises RemoteCommandError: If the command could not be started, or if it failed and
            ``check`` is set.
        :raises RemoteTimeoutError: If the command exceeded its time limit.
        :raises LabLostError: If the machine has exited or hangs.
        """
        captured = {1: stdout or io.BytesIO(), 2: io.BytesIO()}

        def sink(fd: int, data: bytes) -> None:
            captured[fd].write(data)
            if on_output:
                on_output(fd, data)

        def kept(fd: int) -> bytes:
            buffer = captured[fd]
            return buffer.getvalue() if isinstance(buffer, io.BytesIO) else b""

        source = io.BytesIO(stdin or b"") if stdin is None or isinstance(stdin, bytes) else stdin
        command = Invocation(tuple(str(word) for word in argv), timeout, env or {}, cwd, source)
        program = command.argv[0]
        started = time.monotonic()
        try:
            returncode, timed_out = self._execute(command, sink)
        except OSError as error:
            raise RemoteCommandError(f"cannot start {program}: {error}", b"", b"") from error
        result = Completed(command.argv, returncode, kept(1), kept(2), time.monotonic() - started)
        if timed_out:
            raise RemoteTimeoutError(
                f"{program} was killed after {timeout:g} s", result.stdout, result.stderr
            )
        if check and returncode:
            raise RemoteCommandError(
                f"{program} exited with {returncode}", result.stdout, result.stderr
            )
        return result

    def put(self, source: Path, destination: str) -> None:
        """Copy a file, or the content of a directory, to a path on the machine."""
        with tempfile.TemporaryFile() as packed:
            if source.is_dir():
                with tarfile.open(fileobj=packed, mode="w") as tar:
                    tar.add(source, ".", filter=_as_root)
                script = 'mkdir -p "$1" && tar -xf - -C "$1"'
            else:
                with source.open("rb") as file:
                    shutil.copyfileobj(file, packed)
                script = 'mkdir -p "$(dirname "$1")" && cat >"$1" && chmod "$2" "$1"'
            packed.seek(0)
            mode = f"{source.stat().st_mode & 0o7777:o}"
            self.run(["sh", "-c", script, "sh", destination, mode], stdin=packed)

    def get(self, source: str, destination: Path) -> None:
        """Copy a file, or the content of a directory, from the machine to a path."""
        is_directory = self.run(["test", "-d", source], check=False).returncode == 0
        if not is_directory:
            destination.parent.mkdir(parents=True, exist_ok=True)
            with destination.open("wb") as file:
                self.run(["cat", source], stdout=file)
            return
        destination.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile() as packed:
            self.run(["tar", "-C", source, "-cf", "-", "."], stdout=packed)
            packed.seek(0)
            # The tarfile module in Debian 12's Python has no filter for unsafe members.
            unpack = ["tar", "-C", str(destination), "--no-same-owner", "-xf", "-"]
            subprocess.run(unpack, stdin=packed, check=True)

    def install(self, wheels: Sequence[Path]) -> None:
        """Install the modules and the console scripts from wheels.

        This method unpacks the wheels on L0, because pip takes a minute under TCG.
        """
        with tempfile.TemporaryDirectory() as scratch:
            for wheel in wheels:
                _unpack_wheel(wheel, Path(scratch))
            self._install_tree(Path(scratch))

    def install_source(self) -> None:
        """Install this package and qemu_prefault from this source tree.

        This method also copies the dependency qemu.qmp, which Debian does not package.
        """
        packages = [Path(__file__).parent, Path(qemu_prefault.__file__).parent]
        with tempfile.TemporaryDirectory() as scratch:
            site = Path(scratch) / "site"
            skip = shutil.ignore_patterns("__pycache__")
            for package in packages:
                shutil.copytree(package, site / package.name, ignore=skip)
            with contextlib.suppress(ModuleNotFoundError):  # only qemu_prefault needs qemu.qmp
                spec = importlib.util.find_spec("qemu.qmp")
                if spec is not None and spec.origin is not None:
                    shutil.copytree(Path(spec.origin).parent, site / "qemu" / "qmp", ignore=skip)
            _write_script(Path(scratch), "qemu-prefault", "qemu_prefault.__main__", "main")
            self._install_tree(Path(scratch))

    @abc.abstractmethod
    def _install_tree(self, tree: Path) -> None:
        """Install ``tree/site`` (modules) and ``tree/bin`` (scripts)."""


def _as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _write_script(tree: Path, name: str, module: str, function: str) -> None:
    script = tree / "bin" / name
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(
        f"#!/usr/bin/python3\nimport sys\n\nfrom {module} import {function}\n\n"
        f"sys.exit({function}())\n"
    )
    script.chmod(0o755)


def _adopt_script(script: Path) -> None:
    """Make a wheel's script executable, and insert the interpreter's path."""
    content = script.read_bytes()
    if content.startswith(b"#!python"):
        script.write_bytes(b"#!/usr/bin/python3" + content.removeprefix(b"#!python"))
    script.chmod(0o755)


def _unpack_wheel(wheel: Path, tree: Path) -> None:
    site = tree / "site"
    site.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        # zipfile removes ".." and absolute paths.
        archive.extractall(site)  # nosec B202
    for scheme in site.glob("*.data/*"):
        # PEP 427: NAME.data/SCHEME holds the files that are installed outside site-packages.
        target = {"scripts": tree / "bin", "data": tree}.get(scheme.name, site)
        shutil.copytree(scheme, target, dirs_exist_ok=True)
        if scheme.name == "scripts":
            for script in scheme.iterdir():
                _adopt_script(target / script.name)
        shutil.rmtree(scheme)
    for path in site.glob("*.dist-info/entry_points.txt"):
        entries = ConfigParser(delimiters=("=",))
        entries.optionxform = str  # type: ignore[assignment, method-assign]
        entries.read(path)
        if entries.has_section("console_scripts"):
            for name, target_name in entries.items("console_scripts"):
                module, _, function = target_name.partition(":")
                _write_script(tree, name, module.strip(), function.strip())


def kvm_can_prefault() -> bool:
    """Return whether this host's KVM has KVM_CAP_PRE_FAULT_MEMORY (uapi/linux/kvm.h)."""
    try:
        with open("/dev/kvm", "rb+", buffering=0) as kvm:
            return fcntl.ioctl(kvm, _KVM_CHECK_EXTENSION, _KVM_CAP_PRE_FAULT_MEMORY) == 1
    except OSError:
        return False


#: The environment variable that the lab sets in an L1 that Bochs emulates. The CPU that Bochs
#: emulates has the name of Intel's.
EMULATOR_VARIABLE: Final = "QEMU_PREFAULT_EMULATOR"


def is_emulated() -> bool:
    """Return whether QEMU or Bochs emulates this host's CPU, as in the lab."""
    return EMULATOR_VARIABLE in os.environ or "QEMU TCG" in Path("/proc/cpuinfo").read_text()


#: The environment variable that the lab sets if its emulator can run KVM guests with UEFI.
UEFI_VARIABLE: Final = "QEMU_PREFAULT_UEFI"
NO_UEFI: Final = (
    "UEFI under KVM makes this host's emulator (TCG) abort. Use a QEMU with patches/qemu-tcg-cr8."
)


def uefi_aborts() -> bool:
    """Return whether a UEFI guest would make the QEMU that emulates this host abort.

    QEMU 7.2, 10.0 and 11.1 abort. When a KVM guest writes CR8, their helper_write_crN()
    (misc_helper.c) calls cpu_interrupt() without holding the BQL. UEFI writes CR8 after an
    interrupt if another interrupt is pending.
    """
    return is_emulated() and UEFI_VARIABLE not in os.environ


class LocalMachine(Machine):
    """This host itself, whose KVM must be able to prefault."""

    def __init__(self) -> None:
        if not kvm_can_prefault():
            raise UnsupportedError(
                "this host's KVM cannot prefault",
                "use the nested lab (--nested), which needs no KVM",
            )
        self.l2_directory = str(image.l2_files())
        self._scratch = tempfile.TemporaryDirectory(prefix="qemu-prefault-")
        self._environment = {L2_VARIABLE: self.l2_directory}

    def close(self) -> None:
        self._scratch.cleanup()

    def __enter__(self) -> LocalMachine:
        return self

    def _execute(self, command: Invocation, sink: OnOutput) -> tuple[int, bool]:
        process = subprocess.Popen(
            command.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=command.cwd,
            env={**os.environ, **self._environment, **command.env},
            start_new_session=True,
        )
        assert process.stdin and process.stdout and process.stderr

        def feed(pipe: IO[bytes]) -> None:
            try:
                shutil.copyfileobj(command.stdin, pipe)
                pipe.close()
            except BrokenPipeError:
                pass

        def drain(fd: int, pipe: IO[bytes]) -> None:
            while data := os.read(pipe.fileno(), 1 << 16):
                sink(fd, data)

        threads = [
            threading.Thread(target=feed, args=(process.stdin,), daemon=True),
            threading.Thread(target=drain, args=(1, process.stdout), daemon=True),
            threading.Thread(target=drain, args=(2, process.stderr), daemon=True),
        ]
        for thread in threads:
            thread.start()
        timed_out = False
        try:
            process.wait(command.timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            returncode = process.wait()
            for thread in threads:
                # A daemon that the command started may keep the pipes open. Ignore its output.
                thread.join(0.5)
        return returncode, timed_out

    def _install_tree(self, tree: Path) -> None:
        target = Path(self._scratch.name)
        shutil.copytree(tree, target, dirs_exist_ok=True)
        self._environment["PYTHONPATH"] = str(target / "site")
        self._environment["PATH"] = f"{target / 'bin'}:{os.environ.get('PATH', os.defpath)}"
