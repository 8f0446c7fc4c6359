// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Serve the plugin's control socket without QEMU and KVM. test_native_plugin_socket.py links this
 * file with the plugin's files.
 *
 * The program prints the address of 64 MiB of memory and serves until the end of stdin.
 */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "plugin/control_socket.h"
#include "plugin/limits.h"
#include "plugin/options.h"
#include "plugin/state.h"

int main(int argc, char **argv)
{
	char byte;
	void *memory =
		mmap(NULL, 64 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (argc != 2 || memory == MAP_FAILED)
		return 2;
	strncpy(pf_options.socket, argv[1], sizeof(pf_options.socket) - 1);
	pf_vcpus[0] = (struct vcpu){ .fd = -1 };
	pf_vcpu_count = 1;
	pf_limits_open();
	pf_control_socket_start();
	printf("%lu\n", (unsigned long)memory);
	fflush(stdout);
	while (read(0, &byte, 1) > 0)
		;
	return 0;
}
