// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Stands between QEMU and a few functions of libc. By LD_PRELOAD the dynamic linker puts it
 * there; with -plugin the entries of QEMU's global offset table are pointed here. Either way
 * QEMU's own ioctl() calls tell of every memslot and vCPU.
 */
#ifndef QEMU_PREFAULT_PLUGIN_INTERPOSE_H
#define QEMU_PREFAULT_PLUGIN_INTERPOSE_H

#include <stdbool.h>

/* For -plugin; false: QEMU calls ioctl() in a way not known. */
bool pf_interpose_by_got(void);

#endif
