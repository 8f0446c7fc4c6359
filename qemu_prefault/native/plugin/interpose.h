// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Intercept QEMU's calls of a few libc functions. With LD_PRELOAD the dynamic linker resolves them
 * to this file. With -plugin the plugin changes the entries of QEMU's global offset table. In
 * both cases the plugin sees all memslots and vCPUs in QEMU's ioctl() calls.
 */
#ifndef QEMU_PREFAULT_PLUGIN_INTERPOSE_H
#define QEMU_PREFAULT_PLUGIN_INTERPOSE_H

#include <stdbool.h>

/* For -plugin. Returns false if QEMU's ioctl() calls cannot be intercepted. */
bool pf_interpose_by_got(void);

#endif
