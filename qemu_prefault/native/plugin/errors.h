// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Why a request over the control socket is not done: {"error": TEXT, "code": CODE}. Whoever
 * asks decides by the code, which stays; the text is for people, and may change.
 */
#ifndef QEMU_PREFAULT_PLUGIN_ERRORS_H
#define QEMU_PREFAULT_PLUGIN_ERRORS_H

/* X(name, code, text) */
#define REQUEST_ERRORS(X)                                                                 \
	X(BUSY, "busy", "another batch is at work")                                       \
	X(NO_MEMORY, "no-memory", "out of memory")                                        \
	X(NO_THREAD, "no-thread", "no thread could be started")                           \
	X(BAD_RANGE, "bad-range", "a range is: WORKER KIND START SIZE, aligned to pages") \
	X(BAD_CHUNK, "bad-chunk", "a chunk is a multiple of 4096 bytes")                  \
	X(INCOMPLETE, "incomplete", "the list of ranges ended early")                     \
	X(UNKNOWN_REQUEST, "unknown-request",                                             \
	  "the requests are: status, pause, resume, prefault, follow, "                   \
	  "populate auto|all|resident, work COUNT CHUNK_BYTES")

#define REQUEST_ERROR_ENUM(name, code, text) REQUEST_##name,
enum request_error { REQUEST_OK, REQUEST_ERRORS(REQUEST_ERROR_ENUM) };
#undef REQUEST_ERROR_ENUM

#endif
