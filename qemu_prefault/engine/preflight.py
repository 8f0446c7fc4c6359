# SPDX-License-Identifier: GPL-2.0-or-later
"""Check that a run can work and does not harm the guest or the host.

:mod:`.interference` detects a migration that starts during the run. The plugin has its own checks
(``classify()``, native/plugin/memslots.c).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from ..errors import Code, RefusedError, UnsupportedError
from ..host import kvm
from ..host.headroom import REMEDY_HIDDEN, Limit
from ..host.pagemap import Pagemap
from ..host.reservations import Reservation
from ..qemu.memory_map import firmware_ahead, huge_alignment
from ..qemu.queries import MIGRATION_OVER
from ..units import HUGE_PAGE_SIZE, format_size
from .options import Options, Populate
from .plan import Target
from .vm import Vm

if TYPE_CHECKING:
    from ..qemu.queries import VmState


#: Cause, remedy and code of the error for each run state (``query-status``) that rules out a run.
_UNFIT_STATUS: Final = {
    "inmigrate": (
        "the incoming guest's RAM is not loaded yet",
        "run qemu-prefault with --incoming, which waits until the guest is loaded; or start QEMU "
        "with -S (or send `stop` now), and run qemu-prefault when query-status reports paused",
        Code.INCOMING,
    ),
    "postmigrate": (
        "this guest has migrated away",
        "prefault it on the destination",
        Code.MIGRATION,
    ),
    "finish-migrate": (
        "this guest is migrating away",
        "prefault it on the destination",
        Code.MIGRATION,
    ),
    "restore-vm": ("a snapshot is being loaded", "wait until it is loaded", Code.INCOMING),
    "save-vm": ("a snapshot is being saved", "wait until it is saved", Code.MIGRATION),
    "colo": (
        "this guest runs under COLO, which logs dirty pages",
        "stop COLO first",
        Code.DIRTY_LOGGING,
    ),
    "internal-error": (
        "KVM reported an internal error for this guest",
        "the guest cannot continue; reset or restart it first",
        Code.GUEST_STATE,
    ),
    "shutdown": ("this guest has shut down", "start it first", Code.GUEST_STATE),
    "guest-panicked": ("this guest has panicked", "reset it first", Code.GUEST_STATE),
}
#: The ``query-status`` values of a guest that runs, or is about to run, on the destination.
MIGRATED_AWAY: Final = frozenset({"finish-migrate", "postmigrate"})


def check_status(status: str) -> None:
    """Raise an error if a guest in this run state cannot run.

    :param status: The run state, as ``query-status`` returns it.
    :raises RefusedError: If the guest cannot run.
    """
    if status in _UNFIT_STATUS:
        cause, remedy, code = _UNFIT_STATUS[status]
        raise RefusedError(f"{cause} (query-status: {status})", remedy, code=code)


def check_awaits_incoming(state: VmState) -> None:
    """Raise an error if QEMU does not wait for an incoming migration or restore.

    :raises RefusedError: If QEMU is not in the ``inmigrate`` state.
    """
    if state.status != "inmigrate":
        raise RefusedError(
            "this QEMU is not waiting for an incoming migration or a restore "
            f"(query-status: {state.status})",
            "start QEMU with -incoming, and run qemu-prefault before the migration. If the guest "
            "is already loaded, omit --incoming",
            code=Code.NOT_INCOMING,
        )


def check_vm_state(state: VmState, dirty_limit: bool = False) -> None:
    """Raise an error if prefaulting now would harm the guest, or have no effect.

    While dirty pages are logged, KVM maps only 4 KiB pages, and marks each mapped page as dirty
    (``make_spte()``, arch/x86/kvm/mmu/spte.c). A migration would send all these pages again.

    :param dirty_limit: Whether ``query-vcpu-dirty-limit`` shows an active limit.
    :raises RefusedError: If a migration or a dirty-rate measurement is running, if a dirty-rate
        limit is active, or if the guest cannot run.
    """
    migration = state.migration or "none"
    if "postcopy" in migration:
        raise RefusedError(
            f"a postcopy migration is running (query-migrate: {migration})",
            "wait until the migration has completed, because QEMU fetches missing pages from the "
            "source until then",
            code=Code.POSTCOPY,
        )
    check_status(state.status)
    if migration not in MIGRATION_OVER:
        raise RefusedError(
            f"a migration is running (query-migrate: {migration}), so KVM logs dirty pages",
            "prefault the guest on the destination after the migration",
            code=Code.MIGRATION,
        )
    if state.dirty_rate == "measuring" or dirty_limit:
        what, remedy = (
            ("measured", "wait until the measurement has ended (query-dirty-rate)")
            if state.dirty_rate == "measuring"
            else ("limited", "cancel the limit with the QMP cancel-vcpu-dirty-limit command")
        )
        raise RefusedError(
            f"the dirty page rate is being {what}, so KVM logs dirty pages",
            remedy,
            code=Code.DIRTY_LOGGING,
        )


def check_supported(vm: Vm) -> None:
    """Raise an error if this guest or this kernel does not support prefaulting.

    :raises UnsupportedError: If the guest does not run under KVM, or if KVM lacks the ioctl.
    """
    if not vm.state.kvm:
        raise UnsupportedError(
            "this guest does not run under KVM",
            "start QEMU with -accel kvm, or use --populate-only, which works without KVM and "
            "allocates the guest's memory in advance",
            code=Code.NOT_KVM,
        )
    capability = vm.capability
    if capability.available is False:
        raise UnsupportedError(capability.reason, capability.remedy, code=Code.NO_CAPABILITY)


def check_headroom(
    vm: Vm,
    targets: Sequence[Target],
    pagemap: Pagemap,
    force: bool,
    reservation: Reservation | None,
) -> dict[Target, int]:
    """Compute the memory that populating needs, and check that it is available.

    :param force: Whether to skip the check.
    :param reservation: The run's reservation, in which this function records the needed memory.
        None for ``--dry-run``.
    :returns: The bytes that populating would allocate for each target.
    :raises RefusedError: If too little memory is available.
    """
    absent = {}
    for target in targets:
        backing = vm.backing(target.section)
        mapped = pagemap.sums(target.hva, target.size, backing.private)
        elsewhere = max(0, target.section.size - vm.allocated(target.section))
        absent[target] = min(target.size - mapped.present, elsewhere) if target.may_populate else 0
    if force:
        return absent
    with (reservation or Reservation()).check() as others:
        needs = _check_limits(vm, absent, others)
        if reservation is not None:
            reservation.reserve(needs)
    return absent


def _check_limits(
    vm: Vm, absent: Mapping[Target, int], others: Mapping[str, int]
) -> dict[str, int]:
    """Return the bytes that populating takes from each limit, by :attr:`.Limit.key`.

    :param others: The bytes that other runs have reserved from each limit.
    :raises RefusedError: If a limit is too low.
    """
    needs: dict[str, int] = {}
    # The bytes of each mapping that earlier targets populate, by limit. Several sections of guest
    # RAM can share one mapping.
    earlier: dict[tuple[str, int], int] = {}
    sources = {target: vm.memory_source(target.section) for target in absent}
    together = {sources[target].file for target in absent if target.may_populate}
    for target, needed in absent.items():
        if not needed:
            continue
        for limit in sources[target].limits(needed, together):
            _check_known(limit)
            before = earlier.get((limit.key, sources[target].mapping.start), 0)
            earlier[limit.key, sources[target].mapping.start] = before + needed
            more = limit.need(before + needed) - limit.need(before)
            needs[limit.key] = needs.get(limit.key, 0) + more
            reserved = others.get(limit.key, 0)
            beside = f"; other runs have reserved {format_size(reserved)}" if reserved else ""
            if needs[limit.key] + reserved > limit.available:
                raise RefusedError(
                    f"populating needs {format_size(needs[limit.key])}, but {limit.name} has only "
                    f"{format_size(max(0, limit.available - reserved))} available "
                    f"({limit.detail}{beside})",
                    "free memory, raise the limit, or use --populate resident or --max-bytes. To "
                    "skip this check, use --force",
                    code=Code.NO_MEMORY,
                )
    return needs


def _check_known(limit: Limit) -> None:
    if not limit.unknown:
        return
    if limit.device is None:
        remedy, code = f"{REMEDY_HIDDEN}, or use --populate resident", Code.HIDDEN_CGROUP
    else:
        code = Code.NO_MEMORY
        remedy = (
            "run qemu-prefault as root on the host, outside of containers and PID namespaces, or "
            "put the guest's RAM on a file system of its own"
        )
    raise RefusedError(limit.unknown, f"{remedy}. To skip this check, use --force", code=code)


def find_warnings(options: Options, targets: Sequence[Target], state: VmState) -> dict[str, str]:
    """Return a map from codes to warnings about this host and this guest."""
    if options.populate_only:
        return _resident_only(options, targets)
    found: dict[str, str] = {}
    if firmware_ahead(state.ranges) and not options.incoming:
        found[Code.FIRMWARE_AHEAD] = (
            "the guest's firmware has not finished. It will make QEMU delete and re-create the "
            "low-RAM slot, and KVM then drops every stage-2 table. Run qemu-prefault again "
            "after the boot"
        )
    crooked = [
        t.section.name
        for t in targets
        if t.section.size >= HUGE_PAGE_SIZE and not huge_alignment(t.section, HUGE_PAGE_SIZE)
    ]
    if crooked:
        found[Code.NEVER_HUGE] = (
            f"KVM cannot use huge pages for {', '.join(dict.fromkeys(crooked))}, because guest and "
            "host addresses differ modulo 2 MiB; to align them, use memory-backend-file,align=2M"
        )
    paging = kvm.paging()
    if paging is not None and not paging.ad_bits:
        found[Code.NO_EPT_AD] = (
            "KVM uses EPT without accessed/dirty bits (kvm_intel.eptad=N), so the first access to "
            "a prefaulted page still causes one exit"
        )
    if kvm.parameter("kvm", "nx_huge_pages") == "Y":
        found[Code.NX_HUGE_PAGES] = (
            "kvm.nx_huge_pages is on, so KVM maps huge pages non-executable, and the first "
            "instruction fetch from each huge page still faults"
        )
    return found | _resident_only(options, targets)


def _resident_only(options: Options, targets: Sequence[Target]) -> dict[str, str]:
    """Return a warning if ``--populate auto`` excludes memory from populating."""
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
