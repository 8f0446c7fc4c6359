# SPDX-License-Identifier: GPL-2.0-or-later
"""A conformance suite for ``KVM_PRE_FAULT_MEMORY``.

The kernel's own selftest does not check that the ioctl maps pages. Each case of this suite creates
a VM with a few pages of memory. The case then checks KVM's counters, the faults that the guest
takes when it reads or writes, and the contents of the guest's memory. The suite uses a minimal VMM
and does not need QEMU.

    abi.py           constants and structures of KVM's userspace API
    device.py        access to ``/dev/kvm`` and its ioctls
    memory.py        kinds of host memory and the operations on them
    guest_code.py    machine code of the guests' programs
    vmm.py           VMs, vCPUs and KVM's counters
    threads.py       background threads that run functions and guests
    expectations.py  checks for cases, and the exception for a failed check
    suite.py         definition and registry of the cases
    host_facts.py    features and settings of this host
    needs.py         requirements of cases
    runner.py        execution of each case in a separate process
    results.py       conversion of the results to a table and to JSON
    cases/           the cases, one or two modules per area
"""
