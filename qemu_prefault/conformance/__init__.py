# SPDX-License-Identifier: GPL-2.0-or-later
"""A conformance suite for ``KVM_PRE_FAULT_MEMORY``, based on a minimal VMM.

The kernel's own selftest never checks that anything is mapped. Each case of this suite sets up a
virtual machine of a few pages. It then checks KVM's counters, the faults of a guest that reads or
writes, and the contents of the guest's memory.

    abi.py           numbers and structures of ``/dev/kvm``
    device.py        ``/dev/kvm`` and its ioctls
    memory.py        host memory of every kind, and operations on it
    guest_code.py    the guests' machine code
    vmm.py           VMs, vCPUs, statistics
    threads.py       calls and guests that run in background threads
    expectations.py  checks of a case, and the exception for a failed check
    suite.py         the definition and registry of cases
    host_facts.py    features and settings of this host
    needs.py         requirements of cases on the host
    runner.py        runs each case in a process of its own
    results.py       output of results as a table and as JSON
    cases/           the cases, one or two modules per area
"""
