// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_PLUGIN_STATUS_H
#define QEMU_PREFAULT_PLUGIN_STATUS_H

#include <stdio.h>

/* Print the plugin's state as one JSON object. */
void pf_status_print(FILE *out);

#endif
