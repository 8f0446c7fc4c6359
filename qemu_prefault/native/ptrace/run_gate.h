// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Keep the vCPU threads of a paused guest out of KVM_RUN while helpers use their vCPUs.
 *
 * A helper's KVM_PRE_FAULT_MEMORY may write to the vCPU's kvm_run (kvm_handle_signal_exit() and
 * kvm_prepare_memory_fault_exit(), include/linux/kvm_host.h). If the ioctl ran between the end of
 * KVM_RUN and the time at which QEMU reads kvm_run, QEMU would lose a guest exit. This is possible
 * if another client resumes the guest. Therefore a separate process, the gate, traces the threads.
 * The gate stops a thread that is about to enter KVM_RUN, ends the helpers' work, and then resumes
 * the thread.
 *
 * The gate is a process because the tool can be stopped or killed at any time. If the tool is
 * killed, the gate ends the helpers' work and exits. If the gate exits, the kernel detaches the
 * threads.
 */
#ifndef QEMU_PREFAULT_RUN_GATE_H
#define QEMU_PREFAULT_RUN_GATE_H

#include <stdint.h>

#include "target.h"

#define RUN_GATE_VCPUS_MAX 64

/* The tool's requests and the gate's replies. Each is one byte. */
#define RUN_GATE_HOLD 104    /* 'h': trace the threads */
#define RUN_GATE_HELD 72     /* 'H': all threads are traced, and none is in KVM_RUN */
#define RUN_GATE_OPEN 79     /* 'O': a thread entered KVM_RUN; the helpers' work has ended */
#define RUN_GATE_FAILED 70   /* 'F': a thread could not be traced; an int32_t errno follows */
#define RUN_GATE_RELEASE 114 /* 'r': stop tracing the threads */
#define RUN_GATE_RELEASED 82 /* 'R': the threads are not traced */

struct run_gate_vcpu {
	int32_t tid;	  /* the vCPU's thread */
	int32_t padding;  /* 0 */
	uint64_t control; /* address of its helper's control page in QEMU */
};

/*
 * Start the gate. Returns its process id, or a negative errno. The gate ends when the other end of
 * `socket` is closed. The descriptors of `target` must be valid. `count` is at most
 * RUN_GATE_VCPUS_MAX.
 */
int32_t pf_run_gate_start(int32_t socket, const struct pf_target *target,
			  const struct run_gate_vcpu *vcpus, uint32_t count);

#endif
