// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Feed inputs to the C parsers. test_native.py links this file with the plugin's files and with the
 * address and undefined behaviour sanitizers, which abort the program when they detect an error.
 *
 * argv[1] is an empty directory. Each input on stdin is the parser's number and the data's size, as
 * 32-bit words, followed by the data. The program writes one byte to stdout after each input.
 * SIGPROF kills the program if an input takes more than a second of CPU time.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#include "common/headroom.h"
#include "common/memory_source.h"
#include "plugin/host_ranges.h"
#include "plugin/options.h"

static int directory;
static FILE *smaps;

FILE *__real_fopen(const char *path, const char *mode);
FILE *__wrap_fopen(const char *path, const char *mode);

/* Make pf_ranges_learn() read the input instead of /proc/self/smaps. */
FILE *__wrap_fopen(const char *path, const char *mode)
{
	if (smaps && !strcmp(path, "/proc/self/smaps")) {
		FILE *file = smaps;

		smaps = NULL;
		return file;
	}
	return __real_fopen(path, mode);
}

static void put(const char *name, const char *text, size_t size)
{
	int fd = openat(directory, name, O_WRONLY | O_CREAT | O_TRUNC, 0600);

	if (fd < 0 || write(fd, text, size) != (ssize_t)size)
		exit(2);
	close(fd);
}

/* Write the parts of the input, which "--" lines separate, to files. */
static void put_parts(const char *text, size_t size, const char *const *names)
{
	for (; *names; names++) {
		const char *end = memmem(text, size, "--\n", 3);
		size_t length = end ? (size_t)(end - text) : size;

		put(*names, text, length);
		text += end ? length + 3 : length;
		size -= end ? length + 3 : length;
	}
}

static void parse_meminfo(const char *text, size_t size)
{
	int fd;

	put("meminfo", text, size);
	fd = openat(directory, "meminfo", O_RDONLY);
	pf_headroom_host(fd);
	close(fd);
}

static void parse_groups(const char *text, size_t size)
{
	static const char *const names[] = { "cgroup", "mountinfo", NULL };
	static const char *const controllers[] = { "memory", "hugetlb" };
	static struct headroom_group group;

	put_parts(text, size, names);
	for (int i = 0; i < 2; i++) {
		int levels = 0;

		if (!pf_headroom_find_group("cgroup", "mountinfo", controllers[i], &group))
			continue;
		do {
			int fd = pf_headroom_open_group(&group);

			pf_headroom_group(fd, group.unified, HEADROOM_UNLIMITED);
			close(fd);
		} while (pf_headroom_parent(&group) && ++levels < 64);
	}
}

static void parse_group_files(const char *text, size_t size)
{
	static const char *const names[] = {
		"memory.max",  "memory.high",	  "memory.current",
		"memory.stat", "hugetlb.2MB.max", "hugetlb.2MB.current",
		NULL
	};
	static struct headroom_group group = { .directory = ".", .unified = 1 };
	int fd;

	put_parts(text, size, names);
	fd = pf_headroom_open_group(&group);
	pf_headroom_group(fd, group.unified, HEADROOM_UNLIMITED);
	close(fd);
	pf_headroom_hugetlb_group(directory, 1, 2 << 20);
}

static void parse_nodes(const char *text, size_t size)
{
	struct source_nodes nodes, confined;
	char *copy = strndup(text, size);

	if (pf_source_parse_nodes(copy, &nodes))
		pf_source_confine(&nodes, &nodes, &nodes, &confined);
	free(copy);
}

static void parse_pools(const char *text, size_t size)
{
	static const char *const names[] = { "node1/meminfo",
					     "node1/hugepages/hugepages-2048kB/free_hugepages",
					     "hugepages-2048kB/free_hugepages",
					     "hugepages-2048kB/resv_hugepages",
					     "hugepages-2048kB/nr_overcommit_hugepages",
					     "hugepages-2048kB/surplus_hugepages",
					     NULL };
	const struct source_nodes nodes = { { 2 } };

	put_parts(text, size, names);
	pf_source_nodes(directory, &nodes);
	pf_source_hugetlb(directory, directory, &nodes, 2 << 20, 1 << 20, 1 << 30);
	pf_source_hugetlb(directory, directory, NULL, 2 << 20, 1 << 20, 1 << 30);
}

static void parse_smaps(const char *text, size_t size)
{
	smaps = size ? fmemopen((void *)text, size, "r") : NULL;
	pf_ranges_learn();
	pf_ranges_facts(0x7f0000000000, 1 << 20);
	pf_ranges_huge_page_size(0x7f0000000000, 1 << 20);
	/* Forget all mappings. */
	pf_ranges_mapped(0, UINT64_MAX, -1, 0);
}

static void parse_options(const char *text, size_t size)
{
	char *copy = strndup(text, size);

	if (!copy)
		exit(2);
	setenv("QEMU_PREFAULT_OPTIONS", copy, 1);
	pf_options_take_environment();
	free(copy);
}

static void (*const parsers[])(const char *, size_t) = {
	parse_meminfo, parse_groups, parse_group_files, parse_nodes,
	parse_pools,   parse_smaps,  parse_options,
};

static void make_directories(void)
{
	static const char *const names[] = { "node1", "node1/hugepages",
					     "node1/hugepages/hugepages-2048kB",
					     "hugepages-2048kB" };

	for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++)
		if (mkdirat(directory, names[i], 0700))
			exit(2);
}

int main(int argc, char **argv)
{
	const struct itimerval second = { .it_value = { .tv_sec = 1 } };
	uint32_t head[2];

	if (argc != 2 || chdir(argv[1]))
		return 2;
	directory = open(".", O_RDONLY | O_DIRECTORY);
	make_directories();
	while (fread(head, sizeof(head), 1, stdin) == 1) {
		/* No terminating zero, so that the sanitizer detects reads beyond the input. */
		char *text = malloc(head[1] ? head[1] : 1);

		if (!text || head[0] >= sizeof(parsers) / sizeof(*parsers) ||
		    fread(text, 1, head[1], stdin) != head[1])
			return 2;
		setitimer(ITIMER_PROF, &second, NULL);
		parsers[head[0]](text, head[1]);
		free(text);
		putchar('.');
		fflush(stdout);
	}
	return 0;
}
