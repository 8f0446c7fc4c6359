// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_INJECT_H
#define QEMU_PREFAULT_INJECT_H

#include <stdint.h>

/* The stage at which an injection failed. */
enum inject_stage {
	INJECT_OK,
	INJECT_SEIZE,	/* PTRACE_SEIZE or PTRACE_INTERRUPT */
	INJECT_STOP,	/* the thread did not stop in time */
	INJECT_INSPECT, /* its registers or stack could not be read or are not usable */
	INJECT_WRITE,	/* its stack could not be written */
	INJECT_RESUME,	/* it could not be resumed */
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
	uint64_t held_ns; /* how long the thread was stopped */
};

struct inject_request {
	int32_t pid, tid; /* the thread that makes the calls */
	int32_t own_pid;  /* its pid in its own PID namespace */
	int32_t mem_fd;	  /* /proc/PID/mem, read and write */
	struct inject_gadgets gadgets;
	uint64_t area, area_size; /* the helper's mapping: unused addresses */
	const void *image; /* copied to the start of the area: code, start of the control page */
	uint64_t image_size, code_size;
};

/*
 * Check whether the process may map executable memory: map one page at area and unmap it. Leaves
 * no mapping behind, even on failure. image and the sizes are ignored.
 */
int pf_inject_probe(const struct inject_request *request, struct inject_result *result);

/*
 * Make the thread start a helper thread. It maps the area (code page, control pages, stack),
 * copies image to its start, and makes the first code_size bytes executable.
 */
int pf_inject_helper(const struct inject_request *request, struct inject_result *result);

#endif
