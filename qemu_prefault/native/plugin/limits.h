// SPDX-License-Identifier: GPL-2.0-or-later
/* Whether QEMU's limits leave enough for QEMU if the plugin uses a part; see common/limits.h. */
#ifndef QEMU_PREFAULT_PLUGIN_LIMITS_H
#define QEMU_PREFAULT_PLUGIN_LIMITS_H

#include <stdbool.h>
#include <stddef.h>

#include "common/limits.h"

/* The length of a clause about a limit. The path of a cgroup has at most 255 bytes per level. */
#define PF_CLAUSE 1024

/* Open the files of the limits, or close them if the plugin does not prefault. */
void pf_limits_open(void);
void pf_limits_close(void);

/*
 * Return whether each limit leaves enough for QEMU after the plugin has used `need`. If not, store a
 * clause with the figures, whose subject is the plugin, for example "it needs 3 tasks and …".
 * The function does not allocate. Call it before each use.
 */
bool pf_limits_allow(const struct limits_need *need, char clause[PF_CLAUSE]);

#endif
