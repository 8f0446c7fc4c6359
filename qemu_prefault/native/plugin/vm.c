// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "vm.h"

#include <dirent.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "control_socket.h"
#include "headroom.h"
#include "host_ranges.h"
#include "options.h"
#include "state.h"
#include "watchdog.h"

#define CAP_PRE_FAULT_MEMORY 236 /* a distribution's headers may be older */

static atomic_bool seen;

static void set_up(int fd)
{
	pthread_condattr_t monotonic;

	pthread_mutex_lock(&pf_lock);
	if (pf_vm_fd >= 0) { /* one VM in a process; a second one is left alone */
		pthread_mutex_unlock(&pf_lock);
		return;
	}
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&pf_changed, &monotonic);
	pf_vm_fd = fd;
	pf_capable = pf_raw_ioctl(fd, KVM_CHECK_EXTENSION, (void *)CAP_PRE_FAULT_MEMORY) == 1;
	pthread_mutex_unlock(&pf_lock);

	/* What follows allocates. There is no vCPU, slot or thread yet that could need it. */
	if (!pf_capable)
		fprintf(stderr, "qemu-prefault: this KVM has no KVM_PRE_FAULT_MEMORY (Linux 6.11, "
				"and EPT or NPT enabled): nothing will be prefaulted\n");
	/* QEMU's command line tells what no ioctl does: its first KVM_RUN is somebody's blackout. */
	pf_incoming = pf_has_argument("-incoming");
	pf_ranges_open();
	pf_headroom_open();
	if (!pf_watchdog_start())
		fprintf(stderr, "qemu-prefault: no thread could be started\n");
	if (!pf_options.socket_off)
		pf_control_socket_start();
}

void pf_vm_created(int fd)
{
	char *preload = getenv("LD_PRELOAD");

	atomic_store(&seen, true);
	/* This is the program it was meant for: what it starts need not load it. */
	if (pf_options.by_preload && preload && strstr(preload, "qemu-prefault-plugin") &&
	    !strpbrk(preload, ": "))
		unsetenv("LD_PRELOAD");
	set_up(fd);
}

void pf_vm_adopt(void)
{
	DIR *directory = opendir("/proc/self/fd");
	const struct dirent *entry;
	char target[64];

	while (directory && pf_vm_fd < 0 && (entry = readdir(directory))) {
		ssize_t length =
			readlinkat(dirfd(directory), entry->d_name, target, sizeof(target) - 1);

		if (length > 0 && !strncmp(target, "anon_inode:kvm-vm", 17) && length == 17)
			pf_vm_created(atoi(entry->d_name));
	}
	if (directory)
		closedir(directory);
}

bool pf_vm_seen(void)
{
	return atomic_load(&seen);
}
