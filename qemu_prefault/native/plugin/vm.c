// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "vm.h"

#include <dirent.h>
#include <errno.h>
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
#include "limits.h"
#include "options.h"
#include "prefault_thread.h"
#include "prefault_vcpu.h"
#include "state.h"
#include "watchdog.h"

#define CAP_PRE_FAULT_MEMORY 236 /* Linux 6.11; the installed headers may predate it */

enum {
	FILES = 8,	       /* descriptors without those for the levels of cgroups */
	LATER_DESCRIPTORS = 4, /* the control socket, its directory, two prefault vCPUs */
	ARRAYS = 32,	       /* mappings of the plugin's arrays */
};

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

/* Return what must be left. QEMU has created no vCPU yet. Each needs a task and a descriptor. */
static uint32_t reserve(void)
{
	char smp[256];

	return LIMITS_RESERVE +
	       (pf_option_value("-smp", smp, sizeof(smp)) ? pf_limits_vcpus(smp) : 1);
}

/* Return whether QEMU's limits allow the plugin's files and this number of its threads. */
static bool has_room(unsigned int threads, char clause[PF_CLAUSE])
{
	const struct limits_need need = { .reserve = reserve(),
					  .tasks = threads,
					  .descriptors = FILES + LATER_DESCRIPTORS,
					  .mappings = 2 * threads + ARRAYS,
					  .bytes = threads * PF_STACK + MIB(2) };

	return pf_limits_allow(&need, clause);
}

static bool report_shortage(const char *clause)
{
	fprintf(stderr, "qemu-prefault: the plugin does nothing, because %s\n", clause);
	return false;
}

/* Store a clause about an error of pf_start_thread(). */
static const char *no_thread(char clause[PF_CLAUSE])
{
	snprintf(clause, PF_CLAUSE, "it cannot start a thread: %s. Raise QEMU's limit on threads",
		 strerror(errno));
	return clause;
}

static void use_guest_vcpus(const char *why)
{
	pthread_mutex_lock(&pf_lock);
	pf_prefault_vcpus_refuse(why);
	pthread_mutex_unlock(&pf_lock);
}

/* Start the threads that QEMU's limits allow. Returns false if the plugin must do nothing. */
static bool start_within_limits(void)
{
	bool prefault = pf_capable && pf_options.vcpu != VCPU_BORROW;
	unsigned int threads = pf_options.socket_off ? 2 : 3; /* watchdog, messages, socket */
	const struct limits_need later = { .descriptors = LATER_DESCRIPTORS, .reserve = reserve() };
	char clause[PF_CLAUSE], fewer[PF_CLAUSE];

	pf_limits_open();
	if (!has_room(threads + prefault, clause)) {
		if (!prefault || !has_room(threads, fewer))
			return report_shortage(clause);
		prefault = false;
		use_guest_vcpus(clause);
	}
	pf_ranges_open();
	pf_headroom_open();
	if (!pf_limits_allow(&later, clause))
		return report_shortage(clause);
	if (!pf_watchdog_start())
		return report_shortage(no_thread(clause));
	/* Without this thread, the guest's vCPU threads process the queue. */
	if (prefault && !pf_prefault_thread_start())
		use_guest_vcpus(no_thread(clause));
	if (!pf_options.socket_off)
		pf_control_socket_start();
	return true;
}

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
	if (start_within_limits())
		return;
	pf_limits_close();
	pf_ranges_close();
	pf_headroom_close();
	pthread_mutex_lock(&pf_lock);
	pf_capable = false;
	pthread_mutex_unlock(&pf_lock);
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

	if (!directory)
		fprintf(stderr,
			"qemu-prefault: the plugin does nothing, because it cannot read "
			"QEMU's descriptors: %s. Mount /proc, and raise RLIMIT_NOFILE (ulimit -n)\n",
			strerror(errno));
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
