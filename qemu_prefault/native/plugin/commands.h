// SPDX-License-Identifier: GPL-2.0-or-later
/* What is asked for over the control socket. */
#ifndef QEMU_PREFAULT_PLUGIN_COMMANDS_H
#define QEMU_PREFAULT_PLUGIN_COMMANDS_H

#include <stdbool.h>
#include <stdio.h>

/*
 * Answer one request, a line of words, with lines of JSON; README.md lists them. False: the
 * connection has to be closed.
 */
bool pf_command_answer(int fd, FILE *in, FILE *out, char *line);

#endif
