# SPDX-License-Identifier: GPL-2.0-or-later
"""Runner that executes each case in a separate process.

If a case crashes or hangs, the other cases are not affected.
"""

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
from .expectations import Unexpected, error_name, expect_equal
from .host_facts import HostFacts
from .suite import CaseOutcome, ConformanceCase, KnownBad, Skip
from .vmm import IoctlRefused

#: Time in seconds after which a case counts as hung. Even under emulation, the slowest case takes
#: only a few seconds if the host is not busy.
CASE_LIMIT_SECONDS = 60.0


@dataclass(frozen=True)
class CaseResult:
    """The result of one case.

    :ivar text: The reason for the outcome, or a description of what the case observed, or an empty
        string.
    :ivar seconds: The duration of the case, in seconds.
    """

    case: ConformanceCase
    outcome: CaseOutcome
    text: str
    seconds: float


def run(
    cases: Iterable[ConformanceCase],
    host: HostFacts,
    *,
    destructive: bool = False,
    limit_seconds: float = CASE_LIMIT_SECONDS,
    on_result: Callable[[CaseResult], None] = lambda result: None,
) -> list[CaseResult]:
    """Run cases one after the other, and return their results in the same order.

    :param destructive: True to also run the cases that make the kernel log a warning or leak a
        page.
    :param limit_seconds: The time in seconds after which the outcome of a case is ``HANG``.
    :param on_result: A function that is called with each result as soon as it is available.
    """
    results = []
    for case in cases:
        reason = case.obstacle(host)
        if case.destructive and not destructive:
            reason = (
                reason
                or "the kernel would log a warning or leak a page (use --harsh to run the case)"
            )
        if reason:
            result = CaseResult(case, CaseOutcome.SKIP, reason, 0.0)
        else:
            result = _run_in_child(case, host, limit_seconds)
        results.append(result)
        on_result(result)
    return results


def _run_in_child(case: ConformanceCase, host: HostFacts, limit_seconds: float) -> CaseResult:
    reader, writer = os.pipe()
    started = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _child(case, host, writer)
    os.close(writer)
    # The child makes the same call. The process group must exist before either process continues.
    with contextlib.suppress(OSError):
        os.setpgid(child, child)
    pidfd = os.pidfd_open(child)
    try:
        ended = select.select([pidfd], [], [], limit_seconds)[0]
        # Kill all processes that the case has started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        seconds = time.monotonic() - started
        if not ended:
            text = f"did not end within {limit_seconds:g} s"
            return CaseResult(case, CaseOutcome.HANG, text, seconds)
        os.set_blocking(reader, False)
        try:
            data = os.read(reader, 1 << 16)
        except BlockingIOError:  # a process that the case has started still has the pipe open
            data = b""
        if not data:
            code = os.waitstatus_to_exitcode(status)
            how = f"signal {-code}" if code < 0 else f"status {code}"
            return CaseResult(
                case, CaseOutcome.FAIL, f"the case's process ended with {how}", seconds
            )
        name, text = json.loads(data)
        return CaseResult(case, CaseOutcome[name], text, seconds)
    finally:
        os.close(pidfd)
        os.close(reader)


def _child(case: ConformanceCase, host: HostFacts, writer: int) -> None:
    status = 1
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        outcome, text = _run_case(case, host)
        os.write(writer, json.dumps([outcome.name, text[:4000]]).encode())
        status = 0
    finally:
        os._exit(status)  # do not wait for threads that are still in the kernel


def _run_case(case: ConformanceCase, host: HostFacts) -> tuple[CaseOutcome, str]:
    try:
        try:
            seen = case.run()
        except IoctlRefused as refusal:
            return CaseOutcome.REFUSED, _check_refusal(refusal, case, host)
    except KnownBad as bug:
        return CaseOutcome.KNOWN_BAD, str(bug)
    except Skip as reason:
        return CaseOutcome.SKIP, str(reason)
    except Unexpected as problem:
        return CaseOutcome.FAIL, str(problem)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}"
        return CaseOutcome.FAIL, f"{text}:{where.lineno})"
    return (CaseOutcome.DIFFERS, seen) if seen else (CaseOutcome.PASS, "")


def _check_refusal(refusal: IoctlRefused, case: ConformanceCase, host: HostFacts) -> str:
    """Check that the refusal has the expected errno and no side effects.

    :meth:`~.vmm.KvmVcpu.prefault` has already checked that KVM added no leaf. This function checks
    that a new vCPU of the same VM runs. If the case depends on mapped pages, this function also
    checks that the guest reads the expected contents in the range.

    :returns: The text of the result.
    """
    expect_equal(error_name(refusal.error), error_name(host.refusal), "errno of the refusal")
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
                expect_equal(
                    seen,
                    sum(words) & 0xFFFFFFFF,
                    "sum of the words that the guest read",
                )
                return f"{error_name(refusal.error)}; KVM mapped nothing, and the guest can read"
    return f"{error_name(refusal.error)}; KVM mapped nothing, and the guest still runs"
