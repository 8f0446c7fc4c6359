// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Errors in replies to control socket requests: {"error": TEXT, "code": CODE}. Clients must check
 * the code, which is stable. The text is for users and may change.
 */
#ifndef QEMU_PREFAULT_PLUGIN_ERRORS_H
#define QEMU_PREFAULT_PLUGIN_ERRORS_H

/* X(name, code, text) */
#define REQUEST_ERRORS(X)                                                                        \
	X(BUSY, "busy", "another batch is running. Retry when it has ended")                     \
	X(NO_MEMORY, "no-memory", "QEMU could not allocate memory for the request. Free memory") \
	X(NO_THREAD, "no-thread",                                                                \
	  "the plugin starts no thread for this request. Raise QEMU's limit on threads")         \
	X(BAD_RANGE, "bad-range",                                                                \
	  "a range must be WORKER KIND START SIZE, with page-aligned START and SIZE")            \
	X(BAD_CHUNK, "bad-chunk", "CHUNK_BYTES must be a positive multiple of 4096")             \
	X(INCOMPLETE, "incomplete", "the connection was closed before all ranges were sent")     \
	X(UNKNOWN_REQUEST, "unknown-request",                                                    \
	  "the request is unknown. Use one of: status, pause, resume, prefault, follow, "        \
	  "populate auto|all|resident, lend, work COUNT CHUNK_BYTES, "                           \
	  "work-lent COUNT CHUNK_BYTES")

#define REQUEST_ERROR_ENUM(name, code, text) REQUEST_##name,
enum request_error { REQUEST_OK, REQUEST_ERRORS(REQUEST_ERROR_ENUM) };
#undef REQUEST_ERROR_ENUM

#endif
