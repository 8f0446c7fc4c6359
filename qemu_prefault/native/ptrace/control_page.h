// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The page that the tool and one helper thread share.
 *
 * The tool reads and writes it through /proc/PID/mem, the helper directly. Each
 * field has one writer, and 32- and 64-bit fields are naturally aligned, so no
 * lock is needed.
 */
#ifndef QEMU_PREFAULT_CONTROL_PAGE_H
#define QEMU_PREFAULT_CONTROL_PAGE_H

#include "common/prefault_range.h"

#define PREFAULT_CONTROL_MAGIC 0x31746c7561666572ull /* "refault1" */
#define PREFAULT_RANGES_MAX 224

struct prefault_control {
	/*
	 * Written once, before the helper starts. clone()'s child starts with its
	 * stack pointer at entry, "returns" there, and moves on to stack_top.
	 */
	uint64_t entry;
	uint64_t stack_top;
	uint64_t magic;
	uint64_t area_start; /* the helper's whole mapping, unmapped by itself */
	uint64_t area_size;
	uint64_t syscall_ret; /* address of "syscall; ret" in QEMU's text */
	uint64_t sigreturn;   /* address of the signal restorer in QEMU's text */
	uint64_t exit_slot;   /* holds the address of "mov $60,%eax; syscall" */
	uint64_t dead_man_ns; /* leave when heartbeat stands still for so long */
	uint64_t tick_ns;     /* interrupts every system call at this interval; 0: no timers */
	uint64_t kick_ns;     /* kicks the vCPU thread off a lock it holds so long */
	struct prefault_limits limits;
	int32_t vcpu_fd;
	int32_t vcpu_tid;    /* 0: nobody to kick */
	int32_t kick_signal; /* QEMU's SIG_IPI */
	int32_t tool_pid;    /* as QEMU sees it; 0: not visible from there */

	/* Written by the tool. */
	uint64_t heartbeat;
	uint32_t batch;	  /* incremented when ranges[] holds new work */
	uint32_t abort;	  /* end every batch after the current chunk */
	uint32_t release; /* leave when idle */
	uint32_t range_count;

	/* Written by the helper. */
	uint32_t tid;	      /* by the kernel: CLONE_PARENT_SETTID */
	uint32_t ready;	      /* 1 once it runs; negative errno if it cannot */
	uint32_t batch_done;  /* equals batch when the work is done */
	uint32_t tick_signal; /* the signal that interrupts it */
	/* CLOCK_MONOTONIC; chunk_started tells when "done" of the ranges became what it is */
	uint64_t batch_started_ns, chunk_started_ns, batch_finished_ns;
	struct prefault_range ranges[PREFAULT_RANGES_MAX];
};

#endif
