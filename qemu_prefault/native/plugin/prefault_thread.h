// SPDX-License-Identifier: GPL-2.0-or-later
/* The plugin's thread that processes the queue on the prefault vCPUs. */
#ifndef QEMU_PREFAULT_PLUGIN_PREFAULT_THREAD_H
#define QEMU_PREFAULT_PLUGIN_PREFAULT_THREAD_H

#include <stdbool.h>

/* Start the thread. If this fails, the plugin must not create prefault vCPUs. */
bool pf_prefault_thread_start(void);

/*
 * Return whether the thread processes the queue or will do so without an event from QEMU. Call with
 * pf_lock held.
 */
bool pf_prefault_thread_busy(void);

/*
 * Return whether the thread still has to work for a guest that boots, or the firmware may still
 * cause such work. Call with pf_lock held.
 */
bool pf_prefault_thread_boots(void);

#endif
