// SPDX-License-Identifier: GPL-2.0-or-later
/* KVM_X86_QUIRK_SLOT_ZAP_ALL: whether deleting a slot drops every table of the guest. */
#ifndef QEMU_PREFAULT_PLUGIN_QUIRK_H
#define QEMU_PREFAULT_PLUGIN_QUIRK_H

/* Once, when everything is known and nothing is prefaulted yet. The lock is held. */
void pf_quirk_decide(void);

/* A VFIO device needs the quirk. */
void pf_quirk_vfio_seen(void);

#endif
