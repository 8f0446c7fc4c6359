// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "vm.h"

#include <dirent.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "control_socket.h"
#include "headroom.h"
#include "host_ranges.h"
#include "options.h"
#include "prefault_thread.h"
#include "state.h"
#include "watchdog.h"

#define CAP_PRE_FAULT_MEMORY 236 /* Linux 6.11; the installed headers may predate it */

/*
 * The state that this process shares with its forks, until a fork executes another program.
 *
 * Changed by: pf_vm_created() and the fork() handlers.
 */
static struct family {
	atomic_bool vm_seen;
	atomic_int forks;    /* calls to fork() */
	atomic_int children; /* children that have started to run */
	atomic_int youngest; /* pid of the last child, or 0 */
} alone, *family = &alone;

static void set_up(int fd)
{
	pthread_condattr_t monotonic;

	pthread_mutex_lock(&pf_lock);
	if (pf_vm_fd >= 0) { /* the plugin handles only the first VM of the process */
		pthread_mutex_unlock(&pf_lock);
		return;
	}
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&pf_changed, &monotonic);
	pf_vm_fd = fd;
	pf_capable = pf_raw_ioctl(fd, KVM_CHECK_EXTENSION, (void *)CAP_PRE_FAULT_MEMORY) == 1;
	pthread_mutex_unlock(&pf_lock);

	/* The code below allocates, so pf_lock is not held. No vCPU, slot or thread exists yet. */
	if (!pf_capable)
		fprintf(stderr,
			"qemu-prefault: this KVM has no KVM_PRE_FAULT_MEMORY, so the plugin does "
			"not prefault. Use Linux 6.11 or newer with EPT or NPT\n");
	/*
	 * During an incoming migration, work before the first KVM_RUN would extend the downtime. No
	 * ioctl reveals an incoming migration, so check the command line.
	 */
	pf_incoming = pf_has_argument("-incoming");
	pf_ranges_open();
	pf_headroom_open();
	if (!pf_watchdog_start())
		fprintf(stderr,
			"qemu-prefault: the watchdog thread could not be started, so it cannot "
			"interrupt a stuck prefault. Raise QEMU's limit on threads\n");
	/* Without this thread, the guest's vCPU threads process the queue. */
	if (pf_capable && pf_options.vcpu != VCPU_BORROW && !pf_prefault_thread_start())
		pf_options.vcpu = VCPU_BORROW;
	if (!pf_options.socket_off)
		pf_control_socket_start();
}

void pf_vm_created(int fd)
{
	char *preload = getenv("LD_PRELOAD");

	atomic_store(&family->vm_seen, true);
	if (pf_options.by_preload)
		pf_options_take_environment();
	/* This is the program that needs the plugin. Its child processes do not need the plugin. */
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
			/* NOLINTNEXTLINE(clang-analyzer-unix.StdCLibraryFunctions): it is open */
			readlinkat(dirfd(directory), entry->d_name, target, sizeof(target) - 1);

		if (length > 0 && !strncmp(target, "anon_inode:kvm-vm", 17) && length == 17)
			pf_vm_created(atoi(entry->d_name));
	}
	if (directory)
		closedir(directory);
}

/* --- detection of a process without a VM --- */

static void before_fork(void)
{
	atomic_fetch_add(&family->forks, 1);
}

static void in_child(void)
{
	atomic_store(&family->youngest, getpid());
	atomic_fetch_add(&family->children, 1);
}

void pf_vm_watch_forks(void)
{
	void *shared = pf_raw_mmap(NULL, sizeof(*family), PROT_READ | PROT_WRITE,
				   MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (shared != MAP_FAILED && !pthread_atfork(before_fork, NULL, in_child))
		family = shared;
}

static bool runs_this_program(pid_t pid)
{
	char link[32], ours[4096], theirs[4096];
	ssize_t length = readlink("/proc/self/exe", ours, sizeof(ours));

	if (length < 0) /* /proc is not mounted */
		return !kill(pid, 0);
	snprintf(link, sizeof(link), "/proc/%d/exe", pid);
	return readlink(link, theirs, sizeof(theirs)) == length &&
	       !memcmp(ours, theirs, (size_t)length);
}

bool pf_vm_never(void)
{
	pid_t youngest = atomic_load(&family->youngest);

	if (atomic_load(&family->vm_seen))
		return false;
	/* With -daemonize, QEMU forks and the child creates the VM: wait until the child runs. */
	if (atomic_load(&family->forks) != atomic_load(&family->children))
		return false;
	return !youngest || youngest == getpid() || !runs_this_program(youngest);
}
