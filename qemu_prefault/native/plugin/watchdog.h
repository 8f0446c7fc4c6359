// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_PLUGIN_WATCHDOG_H
#define QEMU_PREFAULT_PLUGIN_WATCHDOG_H

#include <stdbool.h>

/*
 * Start the watchdog thread, which kicks vCPUs out of the guest if work is available, and out of
 * stuck ioctls. Returns false if the thread could not be started.
 */
bool pf_watchdog_start(void);

#endif
