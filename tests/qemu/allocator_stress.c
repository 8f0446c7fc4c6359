// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Allocate in several threads while a VM's memory is mapped and unmapped, and print the number of
 * allocations. test_plugin_allocators.py preloads the plugin and an allocator.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define THREADS 8
#define SLOTS 16
#define SLOT_SIZE (4ul << 20)

static atomic_bool end;
static atomic_ulong allocations, answers;

/* Allocate small and large blocks, so that the allocator often returns memory to the kernel. */
static void *allocate(void *argument)
{
	unsigned int seed = (unsigned int)(uintptr_t)argument;
	void *blocks[64] = { 0 };

	while (!atomic_load(&end)) {
		void **block = &blocks[rand_r(&seed) % 64];
		size_t size = 1ul << (4 + rand_r(&seed) % 18);

		free(*block);
		*block = malloc(size);
		if (!*block)
			abort();
		memset(*block, 1, size);
		atomic_fetch_add(&allocations, 1);
	}
	for (int i = 0; i < 64; i++)
		free(blocks[i]);
	return NULL;
}

/*
 * Request the status, because the control socket's thread then takes pf_lock and allocates. The
 * plugin rejects a client if the maximum number of clients is still connected.
 */
static void *ask(void *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	char answer[4096];

	strcpy(address.sun_path, path);
	while (!atomic_load(&end)) {
		int fd = socket(AF_UNIX, SOCK_STREAM, 0);

		if (!connect(fd, (struct sockaddr *)&address, sizeof(address)) &&
		    write(fd, "status\n", 7) == 7 && read(fd, answer, sizeof(answer)) > 0)
			atomic_fetch_add(&answers, 1);
		close(fd);
	}
	return NULL;
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void set_slot(int vm, uint32_t slot, void *memory, uint64_t size)
{
	struct kvm_userspace_memory_region region = { .slot = slot,
						      .guest_phys_addr = slot * SLOT_SIZE,
						      .memory_size = size,
						      .userspace_addr = (uint64_t)memory };

	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region))
		fail("KVM_SET_USER_MEMORY_REGION");
}

/* Map, add, discard and remove guest memory, as QEMU does. */
static void change_memory(int vm, char *reserved, int file, unsigned int round)
{
	uint32_t slot = round % SLOTS;
	char *memory = reserved + slot * SLOT_SIZE;
	int flags = MAP_FIXED | (round & 16 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS);

	set_slot(vm, slot, memory, 0);
	if (mmap(memory, SLOT_SIZE, PROT_READ | PROT_WRITE, flags, round & 16 ? file : -1, 0) ==
	    MAP_FAILED)
		fail("mmap");
	set_slot(vm, slot, memory, SLOT_SIZE);
	memory[0] = 1;
	if (round & 16)
		fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 1 << 20);
	else
		madvise(memory, 1 << 20, MADV_DONTNEED);
}

static void fork_and_allocate(void)
{
	pid_t child = fork();

	if (!child) {
		for (int i = 0; i < 100; i++)
			free(malloc(1ul << (10 + i % 12)));
		_exit(0);
	}
	if (child < 0 || waitpid(child, NULL, 0) != child)
		fail("fork");
}

int main(int argc, char **argv)
{
	int kvm = open("/dev/kvm", O_RDWR), file = memfd_create("ram", 0);
	int vm = kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, 0);
	char *reserved =
		mmap(NULL, SLOTS * SLOT_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	pthread_t threads[THREADS + 1];

	if (argc != 3 || vm < 0 || reserved == MAP_FAILED || ftruncate(file, SLOT_SIZE))
		fail("KVM_CREATE_VM");
	signal(SIGPIPE, SIG_IGN); /* as QEMU does (os_setup_early_signal_handling()) */
	for (uint32_t slot = 0; slot < SLOTS; slot++) {
		mmap(reserved + slot * SLOT_SIZE, SLOT_SIZE, PROT_READ | PROT_WRITE,
		     MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		set_slot(vm, slot, reserved + slot * SLOT_SIZE, SLOT_SIZE);
	}
	for (uintptr_t i = 0; i < THREADS; i++)
		pthread_create(&threads[i], NULL, allocate, (void *)(i + 1));
	pthread_create(&threads[THREADS], NULL, ask, argv[1]);
	for (time_t until = time(NULL) + atoi(argv[2]); time(NULL) < until;) {
		static unsigned int round;

		change_memory(vm, reserved, file, round);
		if (!(round++ % 64))
			fork_and_allocate();
	}
	atomic_store(&end, true);
	for (int i = 0; i <= THREADS; i++)
		pthread_join(threads[i], NULL);
	printf("%lu\n", atomic_load(&allocations));
	return !atomic_load(&answers);
}
