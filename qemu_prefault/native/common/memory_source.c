// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "memory_source.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "headroom.h"

#define DIGITS_MAX 19

/* --- reading files --- */

static bool read_at(int directory, const char *name, char *text, size_t size)
{
	int fd = openat(directory, name, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, text, size - 1);

	if (fd >= 0)
		close(fd);
	if (length <= 0)
		return false;
	text[length] = '\0';
	return true;
}

static bool parse_number(const char *text, uint64_t *number)
{
	size_t digits = strspn(text, "0123456789");

	if (!digits || digits > DIGITS_MAX)
		return false;
	*number = strtoull(text, NULL, 10);
	return true;
}

/* Return the number in a file, or 0 if the file does not exist. */
static uint64_t number_at(int directory, const char *name)
{
	char text[64];
	uint64_t number;

	if (!read_at(directory, name, text, sizeof(text)) || !parse_number(text, &number))
		return 0;
	return number;
}

/* Return the bytes of a line such as "Node 0 MemFree:   1 kB", or 0 if it is absent. */
static uint64_t meminfo_value(const char *text, const char *key)
{
	const char *found = strstr(text, key);
	uint64_t kib;

	if (!found)
		return 0;
	found += strlen(key);
	return parse_number(found + strspn(found, " \t"), &kib) ? kib << 10 : 0;
}

/* --- NUMA nodes --- */

static bool has(const struct source_nodes *nodes, unsigned int node)
{
	return nodes->bits[node / 64] >> node % 64 & 1;
}

int32_t pf_source_parse_nodes(const char *text, struct source_nodes *nodes)
{
	memset(nodes, 0, sizeof(*nodes));
	for (;;) {
		uint64_t first, last;

		if (!parse_number(text, &first))
			break;
		last = first;
		text += strspn(text, "0123456789");
		if (*text == '-') {
			if (!parse_number(++text, &last))
				break;
			text += strspn(text, "0123456789");
		}
		if (last >= SOURCE_NODES_MAX)
			break;
		for (; first <= last; first++)
			nodes->bits[first / 64] |= 1ull << first % 64;
		if (!*text || *text == '\n')
			return 1;
		if (*text++ != ',')
			break;
	}
	memset(nodes, 0, sizeof(*nodes));
	return 0;
}

static bool is_empty(const struct source_nodes *nodes)
{
	const struct source_nodes none = { 0 };

	return !memcmp(nodes, &none, sizeof(none));
}

static struct source_nodes both(const struct source_nodes *a, const struct source_nodes *b)
{
	struct source_nodes result;

	for (size_t i = 0; i < sizeof(a->bits) / sizeof(*a->bits); i++)
		result.bits[i] = a->bits[i] & b->bits[i];
	return result;
}

int32_t pf_source_confine(const struct source_nodes *with_memory, const struct source_nodes *bound,
			  const struct source_nodes *allowed, struct source_nodes *confined)
{
	struct source_nodes in_cpuset;

	*confined = is_empty(bound) ? *with_memory : both(with_memory, bound);
	in_cpuset = both(confined, allowed);
	if (is_empty(&in_cpuset)) /* mm/mempolicy.c, mpol_rebind_nodemask() */
		in_cpuset = both(with_memory, allowed);
	if (!is_empty(&in_cpuset))
		*confined = in_cpuset;
	return !is_empty(confined) && memcmp(confined, with_memory, sizeof(*confined));
}

uint64_t pf_source_nodes(int32_t nodes_fd, const struct source_nodes *nodes)
{
	uint64_t available = 0;
	char name[64], text[8192];

	for (unsigned int node = 0; node < SOURCE_NODES_MAX; node++) {
		if (!has(nodes, node))
			continue;
		snprintf(name, sizeof(name), "node%u/meminfo", node);
		if (read_at(nodes_fd, name, text, sizeof(text)))
			available += meminfo_value(text, " MemFree:") +
				     meminfo_value(text, " Inactive(file):");
	}
	return available;
}

/* --- hugetlb --- */

uint64_t pf_source_hugetlb(int32_t pools_fd, int32_t nodes_fd, const struct source_nodes *nodes,
			   uint64_t page_size, uint64_t ours)
{
	unsigned long long kib = page_size >> 10;
	uint64_t on_nodes = 0, in_pool, reserved;
	char name[96];

	snprintf(name, sizeof(name), "hugepages-%llukB/resv_hugepages", kib);
	reserved = number_at(pools_fd, name);
	ours = ours / page_size + (ours % page_size != 0); /* the guest has part of a page */
	reserved = reserved > ours ? reserved - ours : 0;
	if (!nodes) {
		in_pool = pf_headroom_hugetlb_pool(pools_fd, page_size) / page_size;
		return in_pool > reserved ? (in_pool - reserved) * page_size : 0;
	}
	snprintf(name, sizeof(name), "hugepages-%llukB/free_hugepages", kib);
	in_pool = number_at(pools_fd, name);
	in_pool = in_pool > reserved ? in_pool - reserved : 0;
	for (unsigned int node = 0; node < SOURCE_NODES_MAX; node++) {
		if (!has(nodes, node))
			continue;
		snprintf(name, sizeof(name), "node%u/hugepages/hugepages-%llukB/free_hugepages",
			 node, kib);
		on_nodes += number_at(nodes_fd, name);
	}
	return (on_nodes < in_pool ? on_nodes : in_pool) * page_size;
}

/* --- file systems --- */

uint64_t pf_source_file_system(int32_t fd, uint64_t inodes, int32_t *others)
{
	struct statfs figures;

	*others = 0;
	if (fd < 0 || fstatfs(fd, &figures) || !figures.f_blocks) /* mounted without a size limit */
		return HEADROOM_UNLIMITED;
	*others = !figures.f_files || figures.f_files - figures.f_ffree > inodes + 1;
	return (uint64_t)figures.f_bavail *
	       (uint64_t)(figures.f_frsize ? figures.f_frsize : figures.f_bsize);
}
