// SPDX-License-Identifier: GPL-2.0-or-later
/* The requests of the control socket. */
#ifndef QEMU_PREFAULT_PLUGIN_COMMANDS_H
#define QEMU_PREFAULT_PLUGIN_COMMANDS_H

#include <stdbool.h>
#include <stdio.h>

#include "limits.h"

#define PF_REPLY (3 * PF_CLAUSE)

/*
 * Reply to one request. The request is a line of words, and the reply is one or more lines of JSON.
 * docs/usage/plugin.md lists the requests. Returns false if the caller must close the connection.
 */
bool pf_command_answer(int fd, FILE *in, FILE *out, char *line);
/*
 * Store the reply to a client for which the plugin can start no thread. Returns its length. Does not
 * allocate.
 */
int pf_command_no_thread(char reply[PF_REPLY], const char *clause);

#endif
