// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_INJECT_RESULT_H
#define QEMU_PREFAULT_INJECT_RESULT_H

#include <stdint.h>

/* The stage at which an injection failed. */
enum inject_stage {
	INJECT_OK,
	INJECT_SEIZE,	 /* PTRACE_SEIZE or PTRACE_INTERRUPT */
	INJECT_STOP,	 /* the thread could not be stopped */
	INJECT_IDENTITY, /* the thread is not a thread of the identified process */
	INJECT_INSPECT,	 /* the thread's registers or stack are not readable or not supported */
	INJECT_WRITE,	 /* the thread's stack could not be written */
	INJECT_RESUME,	 /* the thread could not be resumed */
	INJECT_FILTERS,	 /* the thread's seccomp filters could not be read */
	INJECT_MMAP,	 /* an injected mmap() or munmap() failed */
	INJECT_IMAGE,	 /* the helper's memory could not be written */
	INJECT_CLONE,	 /* the injected clone() failed */
};

struct inject_result {
	int32_t stage;			   /* enum inject_stage */
	int32_t error;			   /* errno at that stage, 0 if none applies */
	uint64_t held_ns;		   /* time for which the thread was stopped */
	uint64_t stack_left, stack_needed; /* bytes below the stack pointer; 0: unknown */
};

#endif
