# SPDX-License-Identifier: GPL-2.0-or-later
"""Background threads that run functions and guests."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._native import lib
from . import abi
from .device import IOCTL_LIMIT_SECONDS
from .expectations import expect, expect_equal
from .vmm import KvmVcpu


def wait_for(
    condition: Callable[[], object], what: str, limit: float = IOCTL_LIMIT_SECONDS
) -> None:
    """Poll a condition until it is true.

    :param what: The first part of the error message, for example "KSM did not merge the pages".
    :param limit: The maximum time in seconds.
    :raises Unexpected: If the condition is still false after the maximum time.
    """
    deadline = time.monotonic() + limit
    while not condition():
        expect(time.monotonic() < deadline, f"{what} within {limit:g} s")
        time.sleep(0.001)


class BackgroundCall(threading.Thread):
    """A background thread that calls one function.

    :meth:`result` returns the value of the function, or raises the exception that the function
    raised.
    """

    def __init__(self, what: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._what = what
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._what()
        except BaseException as error:
            self._error = error

    def result(self, limit: float = IOCTL_LIMIT_SECONDS) -> Any:
        self.join(limit)
        expect(not self.is_alive(), f"a background thread did not end within {limit:g} s")
        if self._error is not None:
            raise self._error
        return self._value

    def interrupt(self) -> None:
        signal.pthread_kill(self.ident or 0, lib.pf_vmm_signal())

    def state(self) -> str:
        """Return the thread's state from ``/proc/self/task/TID/stat``.

        Examples are ``R`` (running), ``S`` (interruptible sleep) and ``D`` (uninterruptible sleep).
        If the thread has exited, the state is ``X``.
        """
        try:
            text = Path(f"/proc/self/task/{self.native_id}/stat").read_text()
        except OSError:
            return "X"
        return text.rpartition(")")[2].split()[0]

    def wait_state(self, letters: str, limit: float = IOCTL_LIMIT_SECONDS) -> None:
        """Wait until the state of the thread is one of ``letters``.

        :param limit: The maximum time in seconds.
        :raises Unexpected: If the thread does not enter such a state within this time.
        """
        wait_for(lambda: self.state() in letters, f"a thread did not enter state {letters}", limit)


class RunningVcpu:
    """A context manager that runs an endless guest program in a background thread."""

    def __init__(self, vcpu: KvmVcpu, code: bytes, **registers: int) -> None:
        self.vcpu = vcpu
        vcpu.start_at(code, **registers)
        vcpu.kick(False)
        self.task = BackgroundCall(self._loop)

    def _loop(self) -> int:
        while not self.vcpu.kvm_run[1]:
            reason = self.vcpu.run(limit=0)
            if reason != abi.EXIT_INTR:
                return reason
        return abi.EXIT_INTR

    def __enter__(self) -> RunningVcpu:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        reason = self.stop()
        if kind is None:
            expect_equal(abi.EXIT_NAMES.get(reason, str(reason)), "INTR", "last exit of the guest")

    def stop(self) -> int:
        self.vcpu.kick()
        if self.task.is_alive():
            self.task.interrupt()
        return int(self.task.result())

    def wait_progress(self, rounds: int = 1) -> None:
        """Wait until the guest has increased its counter by ``rounds``.

        :raises Unexpected: If this takes longer than :data:`IOCTL_LIMIT_SECONDS`, or if KVM_RUN
            returns earlier.
        """
        start = self.vcpu.vm.counter
        wait_for(
            lambda: self.vcpu.vm.counter >= start + rounds or not self.task.is_alive(),
            "the guest did not increment its counter",
        )
        expect(
            self.vcpu.vm.counter >= start + rounds,
            "KVM_RUN returned before the guest had increased its counter",
        )
