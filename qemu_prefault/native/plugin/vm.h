// SPDX-License-Identifier: GPL-2.0-or-later
/* QEMU's VM. Its creation starts the plugin's threads. */
#ifndef QEMU_PREFAULT_PLUGIN_VM_H
#define QEMU_PREFAULT_PLUGIN_VM_H

#include <stdbool.h>

/* Called after KVM_CREATE_VM. */
void pf_vm_created(int vm_fd);
/* Find a VM that QEMU created before it loaded the plugin. */
void pf_vm_adopt(void);

/* Install the fork() handlers for pf_vm_never(). Call this as early as possible. */
void pf_vm_watch_forks(void);
/*
 * Return true if neither this process nor its forks have created a VM, and no running fork can
 * still create one.
 */
bool pf_vm_never(void);

#endif
