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
	uint64_t area, area_size; /* the helper's mapping: unused addresses */
	const void *image; /* copied to the start of the area: code, start of the control page */
	uint64_t image_size, code_size;
};

/*
 * Make the thread unmap the area, which a helper of a killed run left behind. image and code_size
 * are ignored.
 */
int pf_inject_munmap(const struct inject_request *request, struct inject_result *result);

/*
 * Make the thread start a helper thread. It maps the area: code_size bytes of code (read and
 * execute), then control pages and stack (read and write). image is copied to its start.
 */
int pf_inject_helper(const struct inject_request *request, struct inject_result *result);

#endif
