// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A minimal virtual machine monitor that only calls KVM_PRE_FAULT_MEMORY, from its main thread.
 * The program uses the same chunk size as the tool, so the program's time is the baseline for
 * seconds.prefault.
 *
 * The VM has one vCPU and one slot of populated, writable anonymous memory with 4K pages. For each
 * line on stdin, the program creates a new VM with the same memory, prefaults the memory, and
 * prints the duration of prefaulting in seconds.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* New in Linux 6.11. Defined here because the installed kernel headers may be older. */
struct args {
	uint64_t gpa, size, flags, padding[5];
};
#define PRE_FAULT_MEMORY _IOWR(KVMIO, 0xd5, struct args)
#define POPULATE_WRITE 23

static double now(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

static double run(int kvm, void *memory, uint64_t size, uint64_t chunk)
{
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (vm < 0)
		err(1, "KVM_CREATE_VM");
	struct kvm_userspace_memory_region region = {
		.memory_size = size,
		.userspace_addr = (uintptr_t)memory,
	};
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region))
		err(1, "KVM_SET_USER_MEMORY_REGION");
	int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	if (vcpu < 0)
		err(1, "KVM_CREATE_VCPU");

	double start = now();
	for (uint64_t at = 0; at < size;) {
		uint64_t bytes = size - at < chunk ? size - at : chunk;
		struct args args = { .gpa = at, .size = bytes };
		if (ioctl(vcpu, PRE_FAULT_MEMORY, &args) && errno != EINTR && errno != EAGAIN)
			err(1, "KVM_PRE_FAULT_MEMORY at %#lx", (unsigned long)at);
		at += bytes - args.size;
	}
	double seconds = now() - start;
	close(vcpu);
	close(vm);
	return seconds;
}

int main(int argc, char **argv)
{
	if (argc != 3)
		errx(2, "usage: loop MIB CHUNK_MIB");
	uint64_t size = strtoull(argv[1], NULL, 0) << 20, chunk = strtoull(argv[2], NULL, 0) << 20;
	int kvm = open("/dev/kvm", O_RDWR);
	if (kvm < 0)
		err(1, "cannot open /dev/kvm");
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED || madvise(memory, size, MADV_NOHUGEPAGE) ||
	    madvise(memory, size, POPULATE_WRITE))
		err(1, "cannot map and populate the guest's memory");
	for (int c; (c = getchar()) != EOF;) {
		if (c == '\n') {
			printf("%.6f\n", run(kvm, memory, size, chunk));
			fflush(stdout);
		}
	}
}
