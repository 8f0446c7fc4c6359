// SPDX-License-Identifier: GPL-2.0-or-later
/* A batch of ranges, as whoever asks for it hands it to prefault_loop.h, and gets it back. */
#ifndef QEMU_PREFAULT_PREFAULT_RANGE_H
#define QEMU_PREFAULT_PREFAULT_RANGE_H

#include <errno.h>
#include <stdint.h>

/* "No progress within the time limit": not an errno the two calls return. */
#define PREFAULT_STUCK ETIME
/* "Told to stop before this range was complete": likewise. */
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
	uint64_t chunk_bytes; /* most that one system call is asked for */
	uint64_t stuck_ns;    /* give a range up after so long without progress */
};

#endif
