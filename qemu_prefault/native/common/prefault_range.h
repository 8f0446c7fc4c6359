// SPDX-License-Identifier: GPL-2.0-or-later
/* The ranges and limits that callers pass to prefault_loop.h. */
#ifndef QEMU_PREFAULT_PREFAULT_RANGE_H
#define QEMU_PREFAULT_PREFAULT_RANGE_H

#include <errno.h>
#include <stdint.h>

/* The range made no progress within the time limit. Neither system call returns this errno. */
#define PREFAULT_STUCK ETIME
/* The loop was stopped before the range was complete. Neither system call returns this errno. */
#define PREFAULT_ABORTED ECANCELED

enum prefault_kind {
	PREFAULT_POPULATE, /* start is a host virtual address */
	PREFAULT_STAGE2,   /* start is a guest physical address */
};

struct prefault_range {
	uint64_t start; /* bytes, page aligned */
	uint64_t size;	/* bytes, page aligned */
	uint64_t done;	/* bytes completed, in order from start */
	int32_t error;	/* 0, or the errno that ended the range */
	uint32_t kind;	/* enum prefault_kind */
};

struct prefault_limits {
	uint64_t chunk_bytes; /* maximum size of one system call */
	uint64_t stuck_ns;    /* end a range after this time without progress */
};

#endif
