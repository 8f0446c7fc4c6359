// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_PLUGIN_CONTROL_SOCKET_H
#define QEMU_PREFAULT_PLUGIN_CONTROL_SOCKET_H

/* Binds the control socket and serves it from threads of its own; a failure is a warning. */
void pf_control_socket_start(void);

#endif
