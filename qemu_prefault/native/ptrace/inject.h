/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef QEMU_PREFAULT_INJECT_H
#define QEMU_PREFAULT_INJECT_H

#include <stdint.h>

/* Where an injection ended when it did not succeed. */
enum inject_stage {
	INJECT_OK,
	INJECT_SEIZE,	 /* PTRACE_SEIZE or PTRACE_INTERRUPT */
	INJECT_STOP,	 /* the thread did not stop in time */
	INJECT_INSPECT,	 /* its registers or its stack could not be read or used */
	INJECT_WRITE,	 /* its stack could not be written */
	INJECT_RESUME,	 /* it could not be sent on its way */
	INJECT_MMAP,	 /* the injected system calls, in order: */
	INJECT_COPY,
	INJECT_PROTECT,
	INJECT_CLONE,
};

struct inject_gadgets {
	uint64_t syscall_ret; /* "syscall; ret" */
	uint64_t sigreturn;   /* "mov $15,%(r|e)ax; syscall" */
};

struct inject_result {
	int32_t stage;	/* enum inject_stage */
	int32_t error;	/* errno at that stage, 0 if none applies */
	uint64_t held_ns; /* how long the thread was held */
};

/*
 * Try whether this process may have executable memory: map and unmap one page.
 * Leaves nothing behind however it ends.
 */
int pf_inject_probe(int32_t pid, int32_t tid, int32_t mem_fd, const struct inject_gadgets *gadgets,
		 uint64_t area, struct inject_result *result);

/*
 * Start a helper thread from thread tid. own_pid is pid as the process itself
 * sees it (another PID namespace). The area (code page, control pages, stack) is
 * mapped at the fixed, free address area; image (the code page and the beginning
 * of struct prefault_control) is copied to its beginning.
 */
int pf_inject_helper(int32_t pid, int32_t tid, int32_t own_pid, int32_t mem_fd,
		  const struct inject_gadgets *gadgets, uint64_t area, uint64_t area_size,
		  const void *image, uint64_t image_size, uint64_t code_size,
		  struct inject_result *result);

#endif
