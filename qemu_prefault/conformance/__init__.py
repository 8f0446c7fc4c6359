# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``KVM_PRE_FAULT_MEMORY`` really does, told by a very small VMM.

The kernel's own selftest never checks that anything is mapped. Here each case sets up a virtual
machine of a few pages, and looks at what only a mapping that is there can bring about: KVM's
counters, the faults of a guest that then reads or writes, and the contents of its memory.

    abi.py           numbers and structures of ``/dev/kvm``
    device.py        ``/dev/kvm`` and its ioctls
    memory.py        host memory of every kind, and what may have happened to it
    guest_code.py    a few bytes of machine code
    vmm.py           VMs, vCPUs, statistics
    threads.py       calls and guests that run meanwhile
    expectations.py  what a case expects, and what was seen instead
    suite.py         what a case is
    host_facts.py    what this host can do
    needs.py         what cases need of it
    runner.py        runs each in a process of its own
    results.py       results as a table and as JSON
    cases/           the cases, a module or two for each area
"""
