// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Intercept QEMU's calls to a few libc functions. With LD_PRELOAD, the dynamic linker resolves
 * these calls to interpose.c. With -plugin, the plugin changes the entries of QEMU's global offset
 * table. In both cases, QEMU's ioctl() calls show the plugin all memslots and vCPUs.
 */
#ifndef QEMU_PREFAULT_PLUGIN_INTERPOSE_H
#define QEMU_PREFAULT_PLUGIN_INTERPOSE_H

#include <stdbool.h>

/* Redirect the calls for -plugin. Returns false if ioctl() calls cannot be intercepted. */
bool pf_interpose_by_got(void);

#endif
