// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_PLUGIN_WATCHDOG_H
#define QEMU_PREFAULT_PLUGIN_WATCHDOG_H

#include <stdbool.h>

/*
 * Start the watchdog thread. If work is available, this thread kicks vCPUs out of the guest. It
 * also interrupts stuck ioctls. Returns false if the thread could not be started.
 */
bool pf_watchdog_start(void);

#endif
