// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_PLUGIN_GUEST_START_H
#define QEMU_PREFAULT_PLUGIN_GUEST_START_H

/* Before the guest's first instruction: everything is known, nothing runs. The lock is held. */
void pf_guest_start(void);

#endif
