// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_PLUGIN_WATCHDOG_H
#define QEMU_PREFAULT_PLUGIN_WATCHDOG_H

#include <stdbool.h>

/*
 * Start the plugin's own thread. It does no work itself: it gets vCPUs out of the guest when
 * there is work, and out of an ioctl that does not end. False: no thread could be started.
 */
bool pf_watchdog_start(void);

#endif
