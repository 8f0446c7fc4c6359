// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "vm.h"

#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "control_socket.h"
#include "headroom.h"
#include "host_ranges.h"
#include "options.h"
#include "state.h"
#include "watchdog.h"

#define CAP_PRE_FAULT_MEMORY 236 /* the installed kernel headers may be older */

static atomic_bool seen_here;
static atomic_bool *seen = &seen_here;

static void set_up(int fd)
{
	pthread_condattr_t monotonic;

	pthread_mutex_lock(&pf_lock);
	if (pf_vm_fd >= 0) { /* only the first VM of the process is handled */
		pthread_mutex_unlock(&pf_lock);
		return;
	}
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&pf_changed, &monotonic);
	pf_vm_fd = fd;
	pf_capable = pf_raw_ioctl(fd, KVM_CHECK_EXTENSION, (void *)CAP_PRE_FAULT_MEMORY) == 1;
	if (!pf_capable)
		fprintf(stderr,
			"qemu-prefault: this KVM has no KVM_PRE_FAULT_MEMORY, so nothing is "
			"prefaulted; it needs Linux 6.11 and EPT or NPT enabled\n");
	/*
	 * No ioctl shows an incoming migration, so check the command line. Work before the first
	 * KVM_RUN would then extend the downtime.
	 */
	pf_incoming = pf_has_argument("-incoming");
	pf_ranges_open();
	pf_headroom_open();
	if (!pf_watchdog_start())
		fprintf(stderr, "qemu-prefault: the watchdog thread could not be started: a stuck "
				"prefault is not interrupted; raise QEMU's limit on threads\n");
	if (!pf_options.socket_off)
		pf_control_socket_start();
	pthread_mutex_unlock(&pf_lock);
}

void pf_vm_created(int fd)
{
	char *preload = getenv("LD_PRELOAD");

	atomic_store(seen, true);
	/* This is the intended program. Its child processes do not need the plugin. */
	if (pf_options.by_preload && preload && strstr(preload, "qemu-prefault-plugin") &&
	    !strpbrk(preload, ": "))
		unsetenv("LD_PRELOAD");
	set_up(fd);
}

void pf_vm_adopt(void)
{
	char name[64], target[64];

	for (int fd = 3; fd < 256 && !atomic_load(seen); fd++) {
		snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
		ssize_t length = readlink(name, target, sizeof(target) - 1);

		if (length > 0 && !strncmp(target, "anon_inode:kvm-vm", 17) && length == 17)
			pf_vm_created(fd);
	}
}

void pf_vm_share(void)
{
	void *page = mmap(NULL, sizeof(*seen), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
			  -1, 0);

	if (page != MAP_FAILED)
		seen = page;
}

bool pf_vm_seen(void)
{
	return atomic_load(seen);
}
