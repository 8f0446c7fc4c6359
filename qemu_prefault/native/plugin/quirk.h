// SPDX-License-Identifier: GPL-2.0-or-later
/* KVM_X86_QUIRK_SLOT_ZAP_ALL, which makes KVM drop all tables when a slot is deleted. */
#ifndef QEMU_PREFAULT_PLUGIN_QUIRK_H
#define QEMU_PREFAULT_PLUGIN_QUIRK_H

/*
 * Disable the quirk if the options and devices allow it. Call once, with pf_lock held, when all
 * devices exist and nothing is prefaulted yet.
 */
void pf_quirk_decide(void);

/* Note that QEMU has created a VFIO device, which needs the quirk. */
void pf_quirk_vfio_seen(void);

#endif
