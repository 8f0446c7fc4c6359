// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_INJECT_H
#define QEMU_PREFAULT_INJECT_H

#include <stdint.h>

/* Where an injection ended when it did not succeed. */
enum inject_stage {
	INJECT_OK,
	INJECT_SEIZE,	/* PTRACE_SEIZE or PTRACE_INTERRUPT */
	INJECT_STOP,	/* the thread did not stop in time */
	INJECT_INSPECT, /* its registers or its stack could not be read or used */
	INJECT_WRITE,	/* its stack could not be written */
	INJECT_RESUME,	/* it could not be sent on its way */
	INJECT_MMAP,	/* the injected system calls, in order: */
	INJECT_COPY,
	INJECT_PROTECT,
	INJECT_CLONE,
};

struct inject_gadgets {
	uint64_t syscall_ret; /* "syscall; ret" */
	uint64_t sigreturn;   /* "mov $15,%(r|e)ax; syscall" */
};

struct inject_result {
	int32_t stage;	  /* enum inject_stage */
	int32_t error;	  /* errno at that stage, 0 if none applies */
	uint64_t held_ns; /* how long the thread was held */
};

struct inject_request {
	int32_t pid, tid; /* the thread that makes the calls */
	int32_t own_pid;  /* pid as the process itself sees it (another PID namespace) */
	int32_t mem_fd;	  /* /proc/PID/mem, read and write */
	struct inject_gadgets gadgets;
	uint64_t area, area_size; /* where the helper's mapping goes: fixed, free addresses */
	const void *image; /* copied to its beginning: the code page, and the control page's */
	uint64_t image_size, code_size;
};

/*
 * Try whether this process may have executable memory: map and unmap one page at area.
 * Leaves nothing behind however it ends. Image and sizes are not looked at.
 */
int pf_inject_probe(const struct inject_request *request, struct inject_result *result);

/*
 * Start a helper thread from that thread. The area (code page, control pages, stack) is
 * mapped; image is copied to its beginning, which is made executable for code_size bytes.
 */
int pf_inject_helper(const struct inject_request *request, struct inject_result *result);

#endif
