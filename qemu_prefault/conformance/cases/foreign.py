# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases that check which processes can issue the ioctl.

Only processes that share the mm of the VM's creator can issue it.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable

from ..._native import lib
from ...host.kvm import Stage2Leaves
from ...units import PAGE_SIZE
from .. import abi, needs
from ..expectations import expect, expect_equal
from ..guest_code import COUNT
from ..suite import add, case
from ..threads import BackgroundCall, RunningVcpu
from ..vmm import COUNTER
from .common import GPA, Fixture, expect_reads, make_fixture

_MM = "virt/kvm/kvm_main.c:kvm_vcpu_ioctl(): kvm->mm != current->mm is EIO (6d4e4c4fca5b)"


def _in_a_child(body: Callable[[], int], between: Callable[[], object] = bool) -> int:
    """Return the errno that ``body`` returns in a forked child.

    :param body: A function that the child calls.
    :param between: A function that the parent calls after the fork and before the child calls
        ``body``. For example, this function makes KVM map the leaves again that the fork unmapped.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 255
        try:
            os.read(reader, 1)
            status = body()
        finally:
            os._exit(status)
    between()
    os.write(writer, b"!")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _prefault(fixture: Fixture) -> int:
    return fixture.vcpu.prefault(GPA, fixture.size, any_error=True).error


def _foreign(fixture: Fixture, body: Callable[[], int]) -> None:
    before: list[Stage2Leaves] = []

    def between() -> None:
        fixture.vcpu.warm()
        before.append(fixture.vm.leaves())

    seen = _in_a_child(body, between)
    expect_equal(errno.errorcode.get(seen), "EIO", "errno in another process")
    expect_equal([fixture.vm.leaves()], before, "leaves")
    # The process that owns the VM is not affected.
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_reads(fixture.vcpu, fixture.memory, 0)


@case(
    "foreign/forked-child",
    "the ioctl fails with EIO in a forked child, which has the same open file but a different mm",
    _MM,
    mapping=True,
)
def forked_child() -> None:
    fixture = make_fixture()
    _foreign(fixture, lambda: _prefault(fixture))


@case(
    "foreign/pidfd-getfd",
    "the ioctl fails with EIO in a process that got the vCPU's descriptor with pidfd_getfd()",
    _MM,
    needs.root,
    mapping=True,
)
def pidfd_getfd() -> None:
    fixture = make_fixture()
    owner = os.getpid()

    def body() -> int:
        mine = lib.take_fd(os.pidfd_open(owner), fixture.vcpu.fd)
        return -int(lib.kvm_pre_fault(mine, GPA, PAGE_SIZE)) if mine >= 0 else 254

    _foreign(fixture, body)


@case(
    "foreign/scm-rights",
    "the ioctl fails with EIO in a process that received the vCPU's descriptor over a socket",
    _MM,
    mapping=True,
)
def scm_rights() -> None:
    fixture = make_fixture()
    ours, theirs = socket.socketpair()
    socket.send_fds(ours, [b"x"], [fixture.vcpu.fd])

    def body() -> int:
        _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
        return -int(lib.kvm_pre_fault(fds[0], GPA, PAGE_SIZE))

    _foreign(fixture, body)


@case(
    "foreign/running-vcpu",
    "in another process, the ioctl fails with EIO even while the vCPU runs, because KVM checks the "
    "mm before it takes vcpu->mutex",
    _MM,
)
def running_vcpu() -> None:
    fixture = make_fixture()
    with RunningVcpu(fixture.vcpu, COUNT, rbx=COUNTER) as running:
        running.wait_progress()
        seen = _in_a_child(lambda: _prefault(fixture))
        running.wait_progress()
    expect_equal(errno.errorcode.get(seen), "EIO", "errno in another process")


@case(
    "foreign/vm-ioctls",
    "ioctls on the VM's descriptor, such as KVM_CREATE_VCPU, also fail with EIO in another process",
    "virt/kvm/kvm_main.c:kvm_vm_ioctl()",
)
def vm_ioctls() -> None:
    fixture = make_fixture()
    seen = _in_a_child(lambda: -int(lib.pf_vmm_ioctl(fixture.vm.fd, abi.CREATE_VCPU, 7)))
    expect_equal(errno.errorcode.get(seen), "EIO", "KVM_CREATE_VCPU by another process")
    expect_reads(fixture.vcpu, fixture.memory, None)


@case(
    "foreign/clone-vm",
    "a child process that shares the mm (CLONE_VM) can issue the ioctl",
    _MM,
    mapping=True,
)
def clone_vm() -> None:
    fixture = make_fixture()
    before = fixture.vm.leaves()
    result = fixture.vcpu.prefault(GPA, fixture.size, call=lib.pf_vmm_ioctl_in_clone)
    expect_equal(
        str(result),
        "success, 0x0 bytes left",
        "ioctl in the CLONE_VM child",
    )
    expect_equal((fixture.vm.leaves() - before).pages_4k, fixture.pages, "pages mapped")
    expect_reads(fixture.vcpu, fixture.memory, 0)


def _in_a_thread(run_there: bool) -> None:
    fixture = make_fixture()
    if run_there:
        BackgroundCall(fixture.vcpu.warm).result()
    before = fixture.vm.leaves()
    BackgroundCall(lambda: fixture.vcpu.prefault_all(GPA, fixture.size)).result()
    expect_equal((fixture.vm.leaves() - before).pages_4k, fixture.pages, "pages mapped")
    expect_reads(fixture.vcpu, fixture.memory, 0)


for run_there in (False, True):
    add(
        f"foreign/thread{'-after-another-ran-it' if run_there else ''}",
        "any thread of the process can issue the ioctl, not only the thread that runs the vCPU",
        "virt/kvm/kvm_main.c:vcpu_load()",
        lambda run_there=run_there: _in_a_thread(run_there),  # type: ignore[misc]
        mapping=True,
    )


@case(
    "foreign/vm-descriptor-closed",
    "the ioctl succeeds even after the VM's descriptor is closed",
    "virt/kvm/kvm_main.c:kvm_vm_ioctl_create_vcpu() takes a reference (kvm_get_kvm())",
    needs.capability,
    mapping=True,
)
def vm_descriptor_closed() -> None:
    fixture = make_fixture()
    os.close(fixture.vm.fd)
    before = fixture.vm.leaves()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_equal((fixture.vm.leaves() - before).pages_4k, fixture.pages, "pages mapped")
    expect_reads(fixture.vcpu, fixture.memory, 0)


@case(
    "foreign/owner-forks",
    "if the VM's process forks, KVM unmaps prefaulted memory, because the fork makes the memory "
    "copy-on-write",
    "mm/memory.c:copy_page_range() calls the notifier",
    mapping=True,
)
def owner_forks() -> None:
    fixture = make_fixture()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    before = fixture.vm.leaves()
    _in_a_child(lambda: 0)
    lost = (before - fixture.vm.leaves()).pages_4k
    expect(
        lost >= fixture.pages, f"the fork unmapped {lost} leaves, expected at least {fixture.pages}"
    )
    fixture.vcpu.warm()
    fixture.vcpu.prefault_all(GPA, fixture.size)
    expect_reads(fixture.vcpu, fixture.memory, 0)
