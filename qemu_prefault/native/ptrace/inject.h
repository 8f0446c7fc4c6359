// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_INJECT_H
#define QEMU_PREFAULT_INJECT_H

#include <stdint.h>

#include "inject_result.h"

struct inject_gadgets {
	uint64_t syscall_ret; /* "syscall; ret" */
	uint64_t sigreturn;   /* "mov $15,%(r|e)ax; syscall" */
};

struct inject_request {
	int32_t pid, tid; /* the thread that makes the calls */
	int32_t mem_fd;	  /* /proc/PID/mem, read and write */
	struct inject_gadgets gadgets;
	uint64_t area, area_size; /* where the helper's mapping goes: fixed, free addresses */
	const void *image; /* copied to its beginning: the code page, and the control page's */
	uint64_t image_size, code_size;
};

/* Unmap the area, which a helper left behind. Image and code size are not looked at. */
int pf_inject_munmap(const struct inject_request *request, struct inject_result *result);

/*
 * Start a helper thread from that thread. The area (code page, control pages, stack) is
 * mapped, its first code_size bytes executable, and image is copied to its beginning.
 */
int pf_inject_helper(const struct inject_request *request, struct inject_result *result);

#endif
