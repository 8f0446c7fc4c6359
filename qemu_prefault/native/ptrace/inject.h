// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_INJECT_H
#define QEMU_PREFAULT_INJECT_H

#include <stdint.h>

#include "inject_result.h"
#include "target.h"

struct inject_gadgets {
	uint64_t syscall_ret; /* "syscall; ret" */
	uint64_t sigreturn;   /* "mov $15,%(r|e)ax; syscall" */
};

struct inject_request {
	struct pf_target target;
	int32_t tid; /* the thread that makes the calls */
	struct inject_gadgets gadgets;
	uint64_t area, area_size; /* address and size in bytes of the helper's mapping */
	const void *image; /* code and start of the control page, copied to the start of the area */
	uint64_t image_size, code_size;
};

/*
 * Make the thread unmap the area that the helper of a killed run has left. Ignores image and
 * code_size.
 */
int pf_inject_munmap(const struct inject_request *request, struct inject_result *result);

/*
 * Make the thread map the area and start a helper thread. The first code_size bytes of the area are
 * code (read and execute), and the rest is control page and stack (read and write). The function
 * copies image to the start of the area.
 */
int pf_inject_helper(const struct inject_request *request, struct inject_result *result);

#endif
