// SPDX-License-Identifier: GPL-2.0-or-later
/* Redirect the program's calls to library functions through its global offset table. */
#ifndef QEMU_PREFAULT_PLUGIN_GOT_H
#define QEMU_PREFAULT_PLUGIN_GOT_H

#include <stddef.h>

struct got_entry {
	const char *name;
	void *function;
};

/* Redirect the named functions. Returns a bit mask of the entries that were redirected. */
unsigned int pf_got_redirect(const struct got_entry *entries, size_t count);

#endif
