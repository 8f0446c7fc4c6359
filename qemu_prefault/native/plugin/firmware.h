// SPDX-License-Identifier: GPL-2.0-or-later
/* How far the guest's firmware is with low RAM, told by QEMU's slots. The lock is held. */
#ifndef QEMU_PREFAULT_PLUGIN_FIRMWARE_H
#define QEMU_PREFAULT_PLUGIN_FIRMWARE_H

#include <stdbool.h>

/* Whether it is still to make QEMU change the slot of low RAM. */
bool pf_firmware_at_work(void);

/* Whether a reset at this moment would end the guest. */
bool pf_firmware_copies_itself(void);

#endif
