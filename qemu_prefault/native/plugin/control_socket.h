/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef QEMU_PREFAULT_CONTROL_SOCKET_H
#define QEMU_PREFAULT_CONTROL_SOCKET_H

/*
 * Binds the control socket and serves it from threads of its own; a failure is a warning.
 * Requests are lines of words, answers are lines of JSON; README.md lists them.
 */
void control_start(void);

#endif
