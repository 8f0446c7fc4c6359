# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs each case in a process of its own, so that one that crashes or hangs is only that."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..units import PAGE_SIZE
from .host import Host
from .suite import Case, KnownBad, Outcome, Skip
from .vmm import Refused, Unexpected, error_name, expect_equal

LIMIT_SECONDS = 60.0
"""A case that takes longer hangs; under emulation the slowest takes a few seconds."""


@dataclass(frozen=True)
class Result:
    """:ivar text: why, or what was seen."""

    case: Case
    outcome: Outcome
    text: str
    seconds: float


def run(
    cases: Iterable[Case],
    host: Host,
    *,
    harsh: bool = False,
    limit_seconds: float = LIMIT_SECONDS,
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run cases one after the other.

    :param harsh: also those that make the kernel warn or cost the host a page.
    """
    results = []
    for case in cases:
        reason = case.obstacle(host)
        if case.harsh and not harsh:
            reason = reason or "makes the kernel warn, or costs a page; run with --harsh"
        if reason:
            result = Result(case, Outcome.SKIP, reason, 0.0)
        else:
            result = _in_child(case, host, limit_seconds)
        results.append(result)
        on_result(result)
    return results


def _in_child(case: Case, host: Host, limit_seconds: float) -> Result:
    reader, writer = os.pipe()
    started = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _child(case, host, writer)
    os.close(writer)
    with contextlib.suppress(OSError):  # the child does it too; one of them is first
        os.setpgid(child, child)
    pidfd = os.pidfd_open(child)
    try:
        ended = select.select([pidfd], [], [], limit_seconds)[0]
        # What the case has started ends with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        seconds = time.monotonic() - started
        if not ended:
            return Result(case, Outcome.HANG, f"no end after {limit_seconds:g} s", seconds)
        os.set_blocking(reader, False)
        try:
            data = os.read(reader, 1 << 16)
        except BlockingIOError:  # a thing it has started still holds the pipe
            data = b""
        if not data:
            code = os.waitstatus_to_exitcode(status)
            how = f"signal {-code}" if code < 0 else f"status {code}"
            return Result(case, Outcome.FAIL, f"the case's process ended with {how}", seconds)
        name, text = json.loads(data)
        return Result(case, Outcome[name], text, seconds)
    finally:
        os.close(pidfd)
        os.close(reader)


def _child(case: Case, host: Host, writer: int) -> None:
    status = 1
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        outcome, text = _judge(case, host)
        os.write(writer, json.dumps([outcome.name, text[:4000]]).encode())
        status = 0
    finally:
        os._exit(status)  # threads that are still in the kernel must not hold it up


def _judge(case: Case, host: Host) -> tuple[Outcome, str]:
    try:
        try:
            seen = case.run()
        except Refused as refusal:
            return Outcome.REFUSED, _look_closer(refusal, case, host)
    except KnownBad as bug:
        return Outcome.KNOWN_BAD, str(bug)
    except Skip as reason:
        return Outcome.SKIP, str(reason)
    except Unexpected as problem:
        return Outcome.FAIL, str(problem)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}"
        return Outcome.FAIL, f"{text}:{where.lineno})"
    return (Outcome.DIFFERS, seen) if seen else (Outcome.PASS, "")


def _look_closer(refusal: Refused, case: Case, host: Host) -> str:
    """The ioctl was refused where it is not on offer: exactly so, and nothing was harmed.

    That no leaf was made has been looked at already. A vCPU of the same VM has to run, and
    what the guest reads in the range has to be what is there.
    """
    expect_equal(error_name(refusal.error), error_name(host.refusal), "the refusal")
    vm = refusal.vcpu.vm
    vcpu = vm.vcpu()
    vcpu.warm()
    if case.mapping:
        for slot in vm.slots.values():
            if slot.memory and slot.gpa <= refusal.gpa < min(slot.gpa + slot.size, 1 << 32):
                offset = slot.offset + refusal.gpa - slot.gpa
                pages = (
                    min(refusal.size, slot.gpa + slot.size - refusal.gpa, 16 * PAGE_SIZE)
                    // PAGE_SIZE
                )
                seen = vcpu.read(refusal.gpa, pages)
                words = (slot.memory.word(offset + PAGE_SIZE * page) for page in range(pages))
                expect_equal(seen, sum(words) & 0xFFFFFFFF, "what the guest reads")
                return f"{error_name(refusal.error)}; nothing mapped, the guest reads on"
    return f"{error_name(refusal.error)}; nothing mapped, the guest runs on"
