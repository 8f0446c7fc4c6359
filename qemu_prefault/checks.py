# SPDX-License-Identifier: GPL-2.0-or-later
"""Before a run: can it work here, can the host afford it, and what the operator should know."""

from __future__ import annotations

from collections.abc import Sequence

from . import kvm
from .errors import RefusedError, UnsupportedError
from .layout import firmware_ahead, huge_alignment
from .pagemap import Pagemap
from .plan import HUGE, PAGE, Policy, Populate, Target
from .report import size
from .session import Session


def refuse_unsupported(session: Session) -> None:
    """Raise if this guest or this kernel cannot.

    :raises UnsupportedError: with what can be had instead.
    """
    if not session.machine.kvm:
        raise UnsupportedError(
            "this guest does not run under KVM",
            "there are no stage-2 tables to fill; start QEMU with -accel kvm. "
            "--populate-only still spares the guest the host's faults.",
            code="not-kvm",
        )
    capability = session.capability
    if capability.available is False:
        raise UnsupportedError(capability.reason, capability.remedy, code="no-capability")


def refuse_unaffordable(
    session: Session, targets: Sequence[Target], pagemap: Pagemap, force: bool
) -> dict[Target, int]:
    """Bytes each target would newly allocate; raise if the host cannot give them.

    :param force: whatever it can give.
    :raises RefusedError: with what is needed, what there is, and which limit it is.
    """
    needs: dict[int, int] = {}
    absent = {}
    for target in targets:
        backing = session.backing(target.section)
        mapped = pagemap.sums(target.hva, target.size, backing.private)
        elsewhere = max(0, target.section.size - session.allocated(target.section))
        absent[target] = min(target.size - mapped.present, elsewhere) if target.touch else 0
        page_size = target.section.page_size
        needs[page_size] = needs.get(page_size, 0) + absent[target]
    if force:
        return absent
    process = session.process
    for page_size, needed in needs.items():
        limits = process.memory_headroom() if page_size == PAGE else process.hugetlb_free(page_size)
        for limit in limits:
            if needed > limit.available:
                raise RefusedError(
                    f"populating needs {size(needed)}, but {limit.name} has only "
                    f"{size(limit.available)} to give ({limit.detail})",
                    "free memory, raise the limit, use --populate resident or --max-bytes; "
                    "--force goes ahead all the same",
                    code="no-memory",
                )
    return absent


def caveats(
    session: Session, policy: Policy, targets: Sequence[Target], incoming: bool
) -> dict[str, str]:
    """What the operator should know about this host and this guest, by code."""
    found = {}
    machine = session.machine
    if firmware_ahead(machine.ranges) and not incoming:
        found["firmware-ahead"] = (
            "the guest's firmware has yet to run: it makes QEMU delete and re-create the slot "
            "of low RAM, and each time KVM drops every stage-2 table. Run this after boot"
        )
    crooked = [
        t.section.name
        for t in targets
        if t.section.size >= HUGE and not huge_alignment(t.section, HUGE)
    ]
    if crooked:
        found["never-huge"] = (
            f"{', '.join(dict.fromkeys(crooked))}: guest and host addresses differ modulo "
            "2 MiB, so KVM can never use huge pages there (memory-backend-file,align=2M)"
        )
    if kvm.parameter("kvm_intel", "eptad") == "N":
        found["no-ept-ad"] = (
            "this CPU's EPT has no accessed/dirty bits: a prefaulted page still takes one "
            "exit at its first access"
        )
    if kvm.parameter("kvm", "nx_huge_pages") == "Y":
        found["nx-huge-pages"] = (
            "kvm.nx_huge_pages is on: huge pages are mapped non-executable, and the guest's "
            "first execution from each still faults"
        )
    if any(t.why_not for t in targets):
        reasons = dict.fromkeys(f"{t.section.name}: {t.why_not}" for t in targets if t.why_not)
        if policy.populate is Populate.AUTO:
            found["resident-only"] = f"only present pages were prefaulted ({'; '.join(reasons)})"
    return found
