// SPDX-License-Identifier: GPL-2.0-or-later
/* QEMU's VM. Its creation starts the plugin's threads. */
#ifndef QEMU_PREFAULT_PLUGIN_VM_H
#define QEMU_PREFAULT_PLUGIN_VM_H

#include <stdbool.h>

/* Called after KVM_CREATE_VM. */
void pf_vm_created(int vm_fd);
/* Find a VM that QEMU created before it loaded the plugin. */
void pf_vm_adopt(void);
/* Let pf_vm_seen() also see the VM of a child process: -daemonize makes QEMU fork. */
void pf_vm_share(void);
bool pf_vm_seen(void);

#endif
