# SPDX-License-Identifier: GPL-2.0-or-later
"""An L1 that an emulator runs, and that the lab controls through the command server."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

from . import command_server
from .channel import Channel, exit_status
from .errors import LabLostError
from .machine import GRACE_SECONDS, Invocation, Machine, OnOutput

# Disable CPU bug mitigations, calibrations and self-tests, which are slow to emulate. Set a long
# watchdog threshold, because a busy host can stall L1 for seconds, which is not a lockup of L1.
KERNEL_ARGS: Final = (
    "panic=-1 oops=panic watchdog_thresh=60 mitigations=off nokaslr "
    "tsc=reliable no_timer_check audit=0 cryptomgr.notests random.trust_cpu=on "
    "rcupdate.rcu_expedited=1 loglevel=5"
)
_INSTALLED = "/opt/qemu-prefault"
_STDIN_BYTES = 1 << 16


class EmulatedMachine(Machine):
    """A booted L1. Leaving the context kills its emulator.

    :ivar emulator_pid: The process id of the emulator.
    """

    l2_directory = "/lab/l2"
    #: The emulator's name and release.
    emulator = "QEMU 7.2"
    #: The most seconds on L0 that a second in L1 can take. L1's clock measures the time limits of
    #: commands.
    slowdown = 1.0

    def __init__(self, channel: Channel, env: Mapping[str, str]) -> None:
        self._channel = channel
        self._env = env
        self.emulator_pid = channel.pid

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    @property
    def console(self) -> str:
        """Return L1's console output since this emulator started."""
        return self._channel.text()

    def power_off(self, timeout: float = 60.0) -> None:
        """Power L1 off and wait until the emulator exits.

        Only the ``boots`` command calls this method. Other callers kill it with :meth:`close`.
        """
        script = "echo o >/proc/sysrq-trigger; sleep 60"
        try:
            self.run(["sh", "-c", script], timeout=timeout, check=False)
        except LabLostError as lost:
            if lost.emulator_status != 0:
                raise
            return
        raise self._channel.give_up("L1 did not power off")

    def _execute(self, command: Invocation, sink: OnOutput) -> tuple[int, bool]:
        channel = self._channel
        request = channel.open()
        message = {
            "argv": command.argv,
            "env": {**self._env, **command.env},
            "cwd": command.cwd,
            "timeout": command.timeout,
            "grace": GRACE_SECONDS,
        }
        # The command server enforces the command's time limit. If it fails to do so, the lab
        # stops waiting at this deadline.
        limit = self.slowdown * (command.timeout + 3 * GRACE_SECONDS)
        deadline = time.monotonic() + limit + channel.heartbeat_limit
        kinds = {command_server.STDOUT: 1, command_server.STDERR: 2}
        try:
            channel.send(command_server.RUN, request.number, json.dumps(message).encode())
            while chunk := command.stdin.read(_STDIN_BYTES):
                channel.send(command_server.STDIN, request.number, chunk)
            channel.send(command_server.STDIN, request.number)
            while True:
                item = channel.take(request, deadline - time.monotonic())
                if item is None:
                    raise channel.give_up(f"L1 did not report the end of {command.argv[0]}")
                kind, payload = item
                if kind in kinds:
                    sink(kinds[kind], payload)
                elif kind == command_server.EXIT:
                    status = exit_status(payload)
                    if "error" in status:
                        raise OSError(status["strerror"])
                    return status["returncode"], status["timed_out"]
        except BaseException:
            # After an error or Ctrl-C, the caller does not need the result, so kill the command.
            if channel.lost is None:
                channel.send(command_server.KILL, request.number, bytes([signal.SIGKILL]))
            raise
        finally:
            channel.forget(request)

    def _install_tree(self, tree: Path) -> None:
        self.put(tree, _INSTALLED)
        script = (
            f'for f in {_INSTALLED}/bin/*; do [ -e "$f" ] && ln -sf "$f" /usr/local/bin/; done; '
            "python3 -c 'import sys; "
            'd = f"/usr/local/lib/python3.{sys.version_info[1]}/dist-packages"; '
            "import os; os.makedirs(d, exist_ok=True); "
            f'open(d + "/qemu-prefault-lab.pth", "w").write("{_INSTALLED}/site\\n")\''
        )
        self.run(["sh", "-c", script])
