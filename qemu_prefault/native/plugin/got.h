// SPDX-License-Identifier: GPL-2.0-or-later
/* Redirects calls of the program itself, by its global offset table. */
#ifndef QEMU_PREFAULT_PLUGIN_GOT_H
#define QEMU_PREFAULT_PLUGIN_GOT_H

#include <stddef.h>

struct got_entry {
	const char *name;
	void *function;
};

/* Returns a mask of the entries that were found and point to their function now. */
unsigned int pf_got_redirect(const struct got_entry *entries, size_t count);

#endif
