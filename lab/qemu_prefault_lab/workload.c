// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The only user-space program in an L2 guest. The program writes to memory on command, and detects
 * any other changes to this memory.
 *
 * The lab sends each command as a line on ttyS0. A reply begins with the first word of its command:
 *
 *   (start)             ready uptime=SECONDS mib=N seconds=S
 *   alloc MIB [huge]    alloc pages=N seconds=S        map and write a new buffer
 *   pass                pass pages=N seconds=S bad=N   write a word in every page
 *   checksum            checksum sum=HEX seconds=S     compute a checksum of every byte
 *   run [MS]            run ok=1                       run passes in the background
 *   status              status passes=N bad=N running=0|1
 *   stop                stop passes=N bad=N longest=S
 *   echo WORD           echo word=WORD
 *   clock               clock reads=N seconds=S        read CLOCK_MONOTONIC N times
 *   modules             modules ok=1                   load the drivers in /modules
 *   nest npt=0|1        nest ok=1                      start a nested guest (L3)
 *   nest-count          nest-count count=N running=0|1 exit=N    read the L3's counter
 *   poweroff            poweroff ok=1
 *   (any error)         error TEXT
 *
 * If the kernel's command line contains workload.mib=N, the program allocates N MiB before "ready".
 * bad is the number of pages that did not contain the value from the previous pass. The reply to
 * "pass" counts this pass only. The other replies count all passes since the program started. Each
 * value depends on the page's number, so the program also detects exchanged pages. longest is the
 * longest time between the ends of two consecutive background passes, on the guest's clock. With
 * kvm-clock, this time excludes periods in which QEMU has stopped the guest. If MS is specified,
 * the program sleeps MS milliseconds after each background pass, to leave CPU time to others.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096, PAGE_WORDS = PAGE_BYTES / 8, CLOCK_READS = 500000 };

static int serial;
static uint64_t *buffer;
static size_t pages;
static uint64_t generation;
static _Atomic uint64_t passes, bad;
static double longest;
static useconds_t pause_us; /* after each pass in the background */
static atomic_bool running;
static pthread_t runner;

static double now(clockid_t clock)
{
	struct timespec ts;
	clock_gettime(clock, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
	char line[256];
	va_list args;
	va_start(args, format);
	int length = vsnprintf(line, sizeof(line) - 1, format, args);
	va_end(args);
	line[length++] = '\n';
	for (int done = 0; done < length;) {
		ssize_t n = write(serial, line + done, length - done);
		if (n > 0)
			done += n;
	}
}

/* Use a different offset in each page, so that the words do not share one cache set. */
static _Atomic uint64_t *word_of(size_t page)
{
	return (_Atomic uint64_t *)&buffer[page * PAGE_WORDS + page % PAGE_WORDS];
}

static uint64_t value_of(size_t page, uint64_t which)
{
	return (which << 40 | page) * 0x9e3779b97f4a7c15u | 1;
}

/*
 * Use an atomic exchange, not a load and a store, so that the first access to a page is a write.
 * The first access to new memory is typically a write, which takes one fault. A read followed by a
 * write would take two.
 */
static void pass(void)
{
	for (size_t page = 0; page < pages; page++) {
		uint64_t old = atomic_exchange_explicit(
			word_of(page), value_of(page, generation + 1), memory_order_relaxed);
		if (old != value_of(page, generation))
			bad++;
	}
	generation++;
	passes++;
}

static const char *allocate(size_t mib, bool huge)
{
	if (buffer)
		munmap(buffer, pages * PAGE_BYTES);
	buffer = NULL;
	pages = 0;
	void *map =
		mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (map == MAP_FAILED)
		return strerror(errno);
	if (madvise(map, mib << 20, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE))
		return strerror(errno);
	buffer = map;
	pages = mib << (20 - 12);
	generation = 0;
	for (size_t page = 0; page < pages; page++)
		atomic_store_explicit(word_of(page), value_of(page, 0), memory_order_relaxed);
	return NULL;
}

static void *run(void *unused)
{
	(void)unused;
	/* Commands must run promptly even if the guest has only one vCPU. */
	setpriority(PRIO_PROCESS, 0, 10);
	longest = 0;
	for (double ended = now(CLOCK_MONOTONIC); atomic_load(&running);) {
		pass();
		if (pause_us)
			usleep(pause_us);
		double before = ended;
		ended = now(CLOCK_MONOTONIC);
		if (ended - before > longest)
			longest = ended - before;
	}
	return NULL;
}

static void stop(void)
{
	if (atomic_exchange(&running, false))
		pthread_join(runner, NULL);
}

/*
 * Load modules. The kernel ignores parameters that a module does not have
 * (unknown_module_param_cb() in kernel/module/main.c).
 */
static const char *load_modules(const char *directory, const char *parameters)
{
	char name[64], path[80];
	snprintf(path, sizeof(path), "%s/order", directory);
	FILE *order = fopen(path, "re");
	const char *error = order ? NULL : strerror(errno);

	while (!error && fscanf(order, "%63s", name) == 1) {
		snprintf(path, sizeof(path), "%s/%s", directory, name);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0 || syscall(SYS_finit_module, fd, parameters, 0))
			error = strerror(errno);
		close(fd);
	}
	if (order)
		fclose(order);
	return error;
}

/*
 * The nested guest (L3): one vCPU that increments a counter in memory in an endless loop. It uses
 * long mode, because without nested paging KVM under TCG fails to enter real and 32-bit protected
 * mode (KVM_EXIT_FAIL_ENTRY).
 */
enum {
	L3_PML4 = 0x0000,
	L3_PDPT = 0x1000,
	L3_PD = 0x2000,
	L3_CODE = 0x3000,
	L3_COUNTER = 0x4000,
	L3_BYTES = 0x5000,
	L3_CPUID_ENTRIES = 256,
};

static struct {
	pthread_t thread;
	int vcpu;
	struct kvm_run *run;
	uint8_t *memory;
	atomic_bool running;
	_Atomic uint32_t exit;
} l3;

static uint64_t l3_count(void)
{
	return l3.memory ? *(volatile uint64_t *)(l3.memory + L3_COUNTER) : 0;
}

static void *run_l3(void *unused)
{
	(void)unused;
	setpriority(PRIO_PROCESS, 0, 10);
	/*
	 * The L3's program exits now and then. Spend half as long outside guest mode as in guest
	 * mode, so that a stop of this guest can find the vCPU in both.
	 */
	for (;;) {
		double entered = now(CLOCK_MONOTONIC);
		int error = ioctl(l3.vcpu, KVM_RUN, NULL) ? errno : 0;
		double left = now(CLOCK_MONOTONIC), until = left + (left - entered) / 2;
		if (error ? error != EINTR : l3.run->exit_reason != KVM_EXIT_IO)
			break;
		while (now(CLOCK_MONOTONIC) < until)
			;
	}
	l3.exit = l3.run->exit_reason;
	atomic_store(&l3.running, false);
	return NULL;
}

static void l3_put(size_t at, uint64_t value)
{
	memcpy(l3.memory + at, &value, sizeof(value));
}

/* Enable paging, with an identity mapping of the first 2 MiB. */
static int l3_set_registers(int kvm)
{
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[L3_CPUID_ENTRIES];
	} cpuid = { .head.nent = L3_CPUID_ENTRIES };
	struct kvm_regs regs = { .rip = L3_CODE, .rflags = 2 };
	struct kvm_sregs sregs;

	if (ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid) || ioctl(l3.vcpu, KVM_SET_CPUID2, &cpuid) ||
	    ioctl(l3.vcpu, KVM_GET_SREGS, &sregs))
		return -1;
	sregs.cr0 = 0x80000011; /* PG, ET, PE */
	sregs.cr3 = L3_PML4;
	sregs.cr4 = 0x20;   /* PAE */
	sregs.efer = 0x500; /* LMA, LME */
	sregs.cs = (struct kvm_segment){
		.selector = 8, .limit = 0xffffffff, .type = 11, .s = 1, .present = 1, .l = 1, .g = 1
	};
	return ioctl(l3.vcpu, KVM_SET_SREGS, &sregs) || ioctl(l3.vcpu, KVM_SET_REGS, &regs);
}

static const char *start_l3(const char *parameters)
{
	static const uint8_t code[] = { /* 1: incq L3_COUNTER; testl $0xfffff, L3_COUNTER; jnz 1b */
					0x48, 0xff, 0x04, 0x25, 0x00, 0x40, 0x00, 0x00, 0xf7, 0x04,
					0x25, 0x00, 0x40, 0x00, 0x00, 0xff, 0xff, 0x0f, 0x00, 0x75,
					0xeb,
					/* out %al, $0x10; jmp 1b */
					0xe6, 0x10, 0xeb, 0xe7
	};
	const char *error = load_modules("/kvm", parameters);
	if (error)
		return error;
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);
	l3.vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	l3.run = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, l3.vcpu, 0);
	l3.memory = mmap(NULL, L3_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (l3.run == MAP_FAILED || l3.memory == MAP_FAILED)
		return strerror(errno);
	struct kvm_userspace_memory_region slot = { .memory_size = L3_BYTES,
						    .userspace_addr = (uintptr_t)l3.memory };
	l3_put(L3_PML4, L3_PDPT | 3); /* present, writable */
	l3_put(L3_PDPT, L3_PD | 3);
	l3_put(L3_PD, 0x83); /* present, writable, 2 MiB page */
	memcpy(l3.memory + L3_CODE, code, sizeof(code));
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot) || l3_set_registers(kvm))
		return strerror(errno);
	l3.running = true;
	return (errno = pthread_create(&l3.thread, NULL, run_l3, NULL)) ? strerror(errno) : NULL;
}

static void command(char *line)
{
	char *word = strtok(line, " ");
	char *first = strtok(NULL, " "), *second = strtok(NULL, " ");
	if (!word)
		return;
	double start = now(CLOCK_MONOTONIC);
	bool idle = !atomic_load(&running);

	if (!strcmp(word, "status")) {
		say("status passes=%" PRIu64 " bad=%" PRIu64 " running=%d", passes, bad, !idle);
	} else if (!strcmp(word, "stop")) {
		stop();
		say("stop passes=%" PRIu64 " bad=%" PRIu64 " longest=%.6f", passes, bad, longest);
	} else if (!strcmp(word, "echo") && first) {
		say("echo word=%s", first);
	} else if (!strcmp(word, "clock")) {
		for (int i = 0; i < CLOCK_READS; i++)
			now(CLOCK_MONOTONIC);
		say("clock reads=%d seconds=%.6f", CLOCK_READS, now(CLOCK_MONOTONIC) - start);
	} else if (!strcmp(word, "modules")) {
		const char *error = load_modules("/modules", "");
		if (error)
			say("error modules: %s", error);
		else
			say("modules ok=1");
	} else if (!strcmp(word, "nest") && first) {
		const char *error = start_l3(first);
		if (error)
			say("error nest: %s", error);
		else
			say("nest ok=1");
	} else if (!strcmp(word, "nest-count")) {
		say("nest-count count=%" PRIu64 " running=%d exit=%u", l3_count(), l3.running,
		    l3.exit);
	} else if (!strcmp(word, "poweroff")) {
		say("poweroff ok=1");
		tcdrain(serial);
		reboot(RB_POWER_OFF);
	} else if (!idle) {
		say("error %s: stop the background passes first", word);
	} else if (!strcmp(word, "alloc") && first && atol(first) > 0) {
		const char *error = allocate(atol(first), second && !strcmp(second, "huge"));
		if (error)
			say("error alloc: %s", error);
		else
			say("alloc pages=%zu seconds=%.6f", pages, now(CLOCK_MONOTONIC) - start);
	} else if (!buffer) {
		say("error %s: nothing is allocated, or the command is unknown", word);
	} else if (!strcmp(word, "pass")) {
		uint64_t before = bad;
		pass();
		double seconds = now(CLOCK_MONOTONIC) - start;
		say("pass pages=%zu seconds=%.6f bad=%" PRIu64, pages, seconds, bad - before);
	} else if (!strcmp(word, "checksum")) {
		uint64_t sum = 0xcbf29ce484222325u;
		for (size_t i = 0; i < pages * PAGE_WORDS; i++)
			sum = (sum ^ buffer[i]) * 0x100000001b3u;
		say("checksum sum=%016" PRIx64 " seconds=%.6f", sum, now(CLOCK_MONOTONIC) - start);
	} else if (!strcmp(word, "run")) {
		pause_us = first ? atol(first) * 1000 : 0;
		atomic_store(&running, true);
		errno = pthread_create(&runner, NULL, run, NULL);
		if (errno) {
			atomic_store(&running, false);
			say("error run: %s", strerror(errno));
		} else {
			say("run ok=1");
		}
	} else {
		say("error unknown command: %s", word);
	}
}

static size_t wanted_mib(void)
{
	char text[4096] = "";
	int fd = open("/proc/cmdline", O_RDONLY);
	if (fd < 0 || read(fd, text, sizeof(text) - 1) < 0)
		return 0;
	close(fd);
	const char *found = strstr(text, "workload.mib=");
	return found ? strtoul(found + strlen("workload.mib="), NULL, 10) : 0;
}

int main(void)
{
	mkdir("/dev", 0755);
	mkdir("/proc", 0755);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	mount("proc", "/proc", "proc", 0, NULL);
	serial = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
	if (serial < 0)
		return 1; /* The kernel panics, and the lab detects this. */
	struct termios tty;
	tcgetattr(serial, &tty);
	cfmakeraw(&tty);
	tcsetattr(serial, TCSANOW, &tty);

	size_t mib = wanted_mib();
	double start = now(CLOCK_MONOTONIC);
	const char *error = mib ? allocate(mib, false) : NULL;
	if (error)
		say("error alloc: %s", error);
	say("ready uptime=%.6f mib=%zu seconds=%.6f", now(CLOCK_BOOTTIME), mib,
	    now(CLOCK_MONOTONIC) - start);

	char line[256];
	size_t length = 0;
	for (;;) {
		char c;
		if (read(serial, &c, 1) != 1)
			continue;
		if (c == '\n' || c == '\r') {
			line[length] = '\0';
			length = 0;
			command(line);
		} else if (length < sizeof(line) - 1) {
			line[length++] = c;
		}
	}
}
