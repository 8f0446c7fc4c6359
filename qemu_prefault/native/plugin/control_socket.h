// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_PLUGIN_CONTROL_SOCKET_H
#define QEMU_PREFAULT_PLUGIN_CONTROL_SOCKET_H

/* Bind the control socket and serve it from new threads. Prints a warning if this fails. */
void pf_control_socket_start(void);

#endif
