// SPDX-License-Identifier: GPL-2.0-or-later
/* QEMU's VM: there is one in a process, and with it everything starts. */
#ifndef QEMU_PREFAULT_PLUGIN_VM_H
#define QEMU_PREFAULT_PLUGIN_VM_H

#include <stdbool.h>

void pf_vm_created(int vm_fd);
/* The plugin came when QEMU had its VM already. */
void pf_vm_adopt(void);

/* For pf_vm_never(), as early as possible. */
void pf_vm_watch_forks(void);
/* There was no VM, in this process or those that it forked, and none of them runs on. */
bool pf_vm_never(void);

#endif
