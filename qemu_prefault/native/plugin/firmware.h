// SPDX-License-Identifier: GPL-2.0-or-later
/* The state of the firmware, derived from QEMU's memslots. Call all functions with pf_lock held. */
#ifndef QEMU_PREFAULT_PLUGIN_FIRMWARE_H
#define QEMU_PREFAULT_PLUGIN_FIRMWARE_H

#include <stdbool.h>

/*
 * Return whether the firmware will still make QEMU change the low-RAM memslot. With UEFI, the
 * memslots do not show this, and the result is always true.
 */
bool pf_firmware_at_work(void);

/*
 * Return whether the firmware is UEFI. If the result was true once, it remains true, because QEMU
 * removes the slot of the flash memory while UEFI writes to this memory.
 */
bool pf_firmware_is_uefi(void);

/* Return whether a reset in the current state would hang the guest. */
bool pf_firmware_copies_itself(void);

#endif
