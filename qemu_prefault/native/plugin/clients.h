// SPDX-License-Identifier: GPL-2.0-or-later
/* The clients of the control socket. A thread serves each of them. */
#ifndef QEMU_PREFAULT_PLUGIN_CLIENTS_H
#define QEMU_PREFAULT_PLUGIN_CLIENTS_H

#include <stdbool.h>

/*
 * Start a thread that serves a connection. If QEMU's limits do not allow a thread, reply with an
 * error. Returns false if the caller must close the connection. Call only in the control thread.
 */
bool pf_client_serve(int fd, bool root);

#endif
