// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The control page, which the tool and one helper thread share.
 *
 * The tool accesses the page through /proc/PID/mem, and the helper accesses it directly. No lock is
 * needed, because each field has only one writer, and 32-bit and 64-bit fields are aligned.
 */
#ifndef QEMU_PREFAULT_CONTROL_PAGE_H
#define QEMU_PREFAULT_CONTROL_PAGE_H

#include "common/prefault_range.h"

#define PREFAULT_CONTROL_MAGIC 0x31746c7561666572ull /* "refault1" */
#define PREFAULT_RANGES_MAX 224

struct prefault_control {
	/*
	 * Written once, before the helper starts. The child of clone() starts with its stack
	 * pointer at entry, so its ret jumps to the address in this field. The code then sets the
	 * stack pointer to stack_top.
	 */
	uint64_t entry;
	uint64_t stack_top;
	uint64_t magic;
	uint64_t area_start; /* the helper's whole mapping, which the helper unmaps when it exits */
	uint64_t area_size;
	uint64_t syscall_ret; /* address of "syscall; ret" in QEMU's text */
	uint64_t sigreturn;   /* address of the signal restorer in QEMU's text */
	uint64_t exit_slot;   /* address of the word that points to "mov $60,%eax; syscall" */
	uint64_t dead_man_ns; /* exit if heartbeat does not change for this long */
	uint64_t tick_ns;     /* the tick interrupts system calls at this interval; 0: no timers */
	struct prefault_limits limits;
	uint64_t rest_bytes; /* maximum size of a chunk that is populated before a rest */
	int32_t vcpu_fd;
	int32_t tool_pid; /* in QEMU's PID namespace; 0: the tool is not visible there */

	/* Written by the tool. */
	uint64_t heartbeat;
	uint32_t batch;	  /* incremented when ranges[] holds new work */
	uint32_t abort;	  /* stop each batch after the current chunk */
	uint32_t release; /* exit when idle */
	uint32_t range_count;
	uint32_t rest_percent; /* rest after populating, in percent of the CPU time; 0: never */

	/* Written by the run gate. 1: another client has resumed the guest, so stop working. */
	uint32_t vcpu_runs;

	/* Written by the helper, except tid. */
	uint32_t tid;	      /* written by the kernel: CLONE_PARENT_SETTID */
	uint32_t ready;	      /* 0: not yet; 1: running; negative errno: cannot run */
	uint32_t batch_done;  /* equals batch once the batch is done */
	uint32_t tick_signal; /* the signal that interrupts the helper's system calls */
	/* CLOCK_MONOTONIC times. chunk_started_ns is the start of the current chunk. */
	uint64_t batch_started_ns, chunk_started_ns, batch_finished_ns;
	struct prefault_range ranges[PREFAULT_RANGES_MAX];
};

#endif
