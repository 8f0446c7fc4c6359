# SPDX-License-Identifier: GPL-2.0-or-later
"""Before a run: can it work here, can the host afford it, and what the operator should know.

Whether a migration starts during the run is the matter of :mod:`.interference`; the plugin decides
for itself (``classify()``, native/plugin/memslots.c).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ..errors import Code, RefusedError, UnsupportedError
from ..host import kvm
from ..host.pagemap import Pagemap
from ..qemu.memory_map import firmware_ahead, huge_alignment
from ..qemu.queries import MIGRATION_OVER
from ..units import HUGE_PAGE_SIZE, format_size
from .options import Options, Populate
from .plan import Target
from .vm import Vm

if TYPE_CHECKING:
    from ..qemu.queries import VmState


# -- may we? -----------------------------------------------------------------------------

_UNFIT_STATUS: Final = {
    "inmigrate": (
        "the incoming guest's RAM is not loaded yet",
        "run this with --incoming: it waits until it is; or start QEMU with -S (or send `stop` "
        "now), and run this when query-status says paused",
        Code.INCOMING,
    ),
    "postmigrate": (
        "this guest has migrated away; it lives at the destination",
        "prefault it there",
        Code.MIGRATION,
    ),
    "finish-migrate": (
        "this guest is migrating away",
        "prefault it at the destination",
        Code.MIGRATION,
    ),
    "restore-vm": ("a snapshot is being loaded", "run this when that is done", Code.INCOMING),
    "save-vm": ("a snapshot is being saved", "run this when that is done", Code.MIGRATION),
    "colo": (
        "this guest runs under COLO, which logs dirty pages",
        "stop COLO first",
        Code.DIRTY_LOGGING,
    ),
    "internal-error": (
        "KVM reported an internal error for this guest",
        "it cannot go on; reset or restart it first",
        Code.GUEST_STATE,
    ),
    "shutdown": ("this guest has shut down", "start it first", Code.GUEST_STATE),
    "guest-panicked": ("this guest has panicked", "reset it first", Code.GUEST_STATE),
}
MIGRATED_AWAY: Final = frozenset({"finish-migrate", "postmigrate"})


def check_status(status: str) -> None:
    """Raise if a guest of this ``query-status`` cannot run.

    :raises RefusedError: with the reason and what to wait for.
    """
    if status in _UNFIT_STATUS:
        cause, remedy, code = _UNFIT_STATUS[status]
        raise RefusedError(f"{cause} (query-status: {status})", remedy, code=code)


def check_awaits_incoming(state: VmState) -> None:
    """Raise if no RAM is about to be loaded.

    :raises RefusedError: with what the guest is doing.
    """
    if state.status != "inmigrate":
        raise RefusedError(
            f"no migration or restore is awaited here (query-status: {state.status})",
            "start QEMU with -incoming, and this before the migration; for a guest that is there "
            "already leave --incoming out",
            code=Code.NOT_INCOMING,
        )


def check_vm_state(state: VmState, dirty_limit: bool = False) -> None:
    """Raise if prefaulting now would hurt the guest, or be in vain.

    While dirty pages are logged, KVM maps by 4 KiB only and marks each page it maps as dirty
    (arch/x86/kvm/mmu/spte.c, ``make_spte()``): a migration would send them all again.

    :param dirty_limit: whether ``query-vcpu-dirty-limit`` shows a limit in force.
    :raises RefusedError: with the reason and what to wait for.
    """
    migration = state.migration or "none"
    if "postcopy" in migration:
        raise RefusedError(
            f"a postcopy migration is under way (query-migrate: {migration})",
            "wait until it has completed: missing pages must come from the source first",
            code=Code.POSTCOPY,
        )
    check_status(state.status)
    if migration not in MIGRATION_OVER:
        raise RefusedError(
            f"a migration is under way (query-migrate: {migration}): dirty pages are logged",
            "prefault at the destination, after it has completed",
            code=Code.MIGRATION,
        )
    if state.dirty_rate == "measuring" or dirty_limit:
        what = "measured" if state.dirty_rate == "measuring" else "limited"
        raise RefusedError(
            f"the dirty page rate is being {what}: dirty pages are logged",
            "run this when that is over (query-dirty-rate, query-vcpu-dirty-limit)",
            code=Code.DIRTY_LOGGING,
        )


def check_supported(vm: Vm) -> None:
    """Raise if this guest or this kernel cannot.

    :raises UnsupportedError: with what can be had instead.
    """
    if not vm.state.kvm:
        raise UnsupportedError(
            "this guest does not run under KVM",
            "there are no stage-2 tables to fill; start QEMU with -accel kvm. "
            "--populate-only still spares the guest the host's faults.",
            code=Code.NOT_KVM,
        )
    capability = vm.capability
    if capability.available is False:
        raise UnsupportedError(capability.reason, capability.remedy, code=Code.NO_CAPABILITY)


def check_headroom(
    vm: Vm, targets: Sequence[Target], pagemap: Pagemap, force: bool
) -> dict[Target, int]:
    """Bytes each target would newly allocate; raise if the host cannot give them.

    :param force: whatever it can give.
    :raises RefusedError: with what is needed, what there is, and which limit it is.
    """
    absent = {}
    for target in targets:
        backing = vm.backing(target.section)
        mapped = pagemap.sums(target.hva, target.size, backing.private)
        elsewhere = max(0, target.section.size - vm.allocated(target.section))
        absent[target] = min(target.size - mapped.present, elsewhere) if target.may_populate else 0
    if force:
        return absent
    needs: dict[str, int] = {}
    for target, needed in absent.items():
        if not needed:
            continue
        for limit in vm.memory_source(target.section).limits(needed):
            needs[limit.name] = needs.get(limit.name, 0) + needed
            if needs[limit.name] > limit.available:
                raise RefusedError(
                    f"populating needs {format_size(needs[limit.name])}, but {limit.name} has only "
                    f"{format_size(limit.available)} to give ({limit.detail})",
                    "free memory, raise the limit, use --populate resident or --max-bytes; "
                    "--force goes ahead all the same",
                    code=Code.NO_MEMORY,
                )
    return absent


def find_warnings(options: Options, targets: Sequence[Target], state: VmState) -> dict[str, str]:
    """What the operator should know about this host and this guest, by code."""
    if options.populate_only:
        return _resident_only(options, targets)
    found: dict[str, str] = {}
    if firmware_ahead(state.ranges) and not options.incoming:
        found[Code.FIRMWARE_AHEAD] = (
            "the guest's firmware has yet to run: it makes QEMU delete and re-create the slot "
            "of low RAM, and each time KVM drops every stage-2 table. Run this after boot"
        )
    crooked = [
        t.section.name
        for t in targets
        if t.section.size >= HUGE_PAGE_SIZE and not huge_alignment(t.section, HUGE_PAGE_SIZE)
    ]
    if crooked:
        found[Code.NEVER_HUGE] = (
            f"{', '.join(dict.fromkeys(crooked))}: guest and host addresses differ modulo "
            "2 MiB, so KVM can never use huge pages there (memory-backend-file,align=2M)"
        )
    if kvm.parameter("kvm_intel", "eptad") == "N":
        found[Code.NO_EPT_AD] = (
            "this CPU's EPT has no accessed/dirty bits: a prefaulted page still takes one "
            "exit at its first access"
        )
    if kvm.parameter("kvm", "nx_huge_pages") == "Y":
        found[Code.NX_HUGE_PAGES] = (
            "kvm.nx_huge_pages is on: huge pages are mapped non-executable, and the guest's "
            "first execution from each still faults"
        )
    return found | _resident_only(options, targets)


def _resident_only(options: Options, targets: Sequence[Target]) -> dict[str, str]:
    """Why some memory is not populated; nothing if the user asked for that."""
    found: dict[str, str] = {}
    if any(t.why_not for t in targets):
        reasons = dict.fromkeys(f"{t.section.name}: {t.why_not}" for t in targets if t.why_not)
        if options.populate is Populate.AUTO:
            what = (
                "nothing was populated"
                if options.populate_only
                else "only present pages were prefaulted"
            )
            found[Code.RESIDENT_ONLY] = f"{what} ({'; '.join(reasons)})"
    return found
