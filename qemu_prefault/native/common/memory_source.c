// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "memory_source.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "headroom.h"

#define DIGITS_MAX 19
#define LEVELS_MAX 8	 /* nested directories */
#define ENTRIES_MAX 4096 /* of a file system */
#define DIRECTORY_FLAGS (O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)

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

/* Return the bytes of a line such as "Node 0 MemFree:   1 kB", or 0 if the line is absent. */
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
	uint64_t next = 0; /* the kernel prints the numbers in ascending order */

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
		if (first < next || last >= SOURCE_NODES_MAX)
			break;
		next = last + 1;
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
			   uint64_t page_size, uint64_t ours, uint64_t host)
{
	unsigned long long kib = page_size >> 10;
	uint64_t on_nodes = 0, in_pool, reserved;
	char name[96];

	snprintf(name, sizeof(name), "hugepages-%llukB/resv_hugepages", kib);
	reserved = number_at(pools_fd, name);
	ours = ours / page_size + (ours % page_size != 0); /* round up */
	reserved = reserved > ours ? reserved - ours : 0;
	if (!nodes) {
		in_pool = pf_headroom_hugetlb_pool(pools_fd, page_size, host) / page_size;
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

int32_t pf_source_is_stacked(uint64_t type, uint64_t device)
{
	/* linux/magic.h has some of these numbers only in newer releases. */
	static const uint32_t stored_elsewhere[] = {
		0x9123683e, /* btrfs */
		0xca451a4e, /* bcachefs */
		0x2fc12fc1, /* ZFS */
		0x6969,	    /* NFS */
		0x01021997, /* 9p */
		0x00c36400, /* Ceph */
		0xff534d42, /* CIFS */
		0xfe534d42, /* SMB2 */
		0x65735546, /* FUSE */
	};

	for (size_t i = 0; i < sizeof(stored_elsewhere) / sizeof(*stored_elsewhere); i++)
		if ((uint32_t)type == stored_elsewhere[i])
			return 0;
	return !major(device);
}

uint64_t pf_source_file_system(int32_t fd, uint64_t *inodes)
{
	struct statfs figures;

	*inodes = 0;
	/* Without a size limit, hugetlbfs reports -1 blocks if it has min_size=, and else 0. */
	if (fd < 0 || fstatfs(fd, &figures) || (int64_t)figures.f_blocks <= 0)
		return HEADROOM_UNLIMITED;
	if (figures.f_files)
		*inodes = (uint64_t)figures.f_files - (uint64_t)figures.f_ffree;
	return (uint64_t)figures.f_bavail *
	       (uint64_t)(figures.f_frsize ? figures.f_frsize : figures.f_bsize);
}

struct walk {
	dev_t device;
	const uint64_t *ours;
	uint32_t our_count;
	uint64_t inodes, committed;
};

struct directory_entry { /* struct linux_dirent64, fs/readdir.c */
	uint64_t inode;
	int64_t offset;
	uint16_t length;
	uint8_t type;
	char name[];
};

static bool is_ours(const struct walk *walk, uint64_t inode)
{
	for (uint32_t i = 0; i < walk->our_count; i++)
		if (walk->ours[i] == inode)
			return true;
	return false;
}

static bool walk_directory(struct walk *walk, int fd, unsigned int depth);

static bool walk_entry(struct walk *walk, int directory, const char *name, unsigned int depth)
{
	struct statx status;

	/*
	 * The entry may be a mount point of a network or FUSE file system whose server does not
	 * respond. With AT_STATX_DONT_SYNC, the kernel does not ask the server (fs/fuse/dir.c,
	 * fuse_update_get_attr()).
	 */
	if (statx(directory, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC,
		  STATX_BASIC_STATS, &status))
		return errno == ENOENT; /* removed meanwhile */
	if (++walk->inodes > ENTRIES_MAX)
		return false;
	if (makedev(status.stx_dev_major, status.stx_dev_minor) != walk->device)
		return true; /* a mount point */
	if (S_ISREG(status.stx_mode)) {
		uint64_t blocks = status.stx_blocks * 512;

		if (status.stx_nlink > 1) /* the file would be counted more than once */
			return false;
		if (status.stx_size > blocks && !is_ours(walk, status.stx_ino))
			walk->committed += status.stx_size - blocks;
	}
	if (!S_ISDIR(status.stx_mode))
		return true;

	int fd = depth ? openat(directory, name, DIRECTORY_FLAGS) : -1;
	bool complete = fd >= 0 && walk_directory(walk, fd, depth - 1);

	if (fd >= 0)
		close(fd);
	return complete;
}

/* Read a directory with a system call, because opendir() allocates memory. */
static bool walk_directory(struct walk *walk, int fd, unsigned int depth)
{
	_Alignas(struct directory_entry) char buffer[4096];
	long length;

	while ((length = syscall(SYS_getdents64, fd, buffer, sizeof(buffer))) > 0) {
		const struct directory_entry *entry;

		for (long at = 0; at < length; at += entry->length) {
			entry = (const struct directory_entry *)&buffer[at];
			if (strcmp(entry->name, ".") && strcmp(entry->name, "..") &&
			    !walk_entry(walk, fd, entry->name, depth))
				return false;
		}
	}
	return length == 0;
}

/*
 * Open the directory of a file that QEMU has open, even if the file is deleted. Returns -1 on
 * error.
 */
static int open_directory_of(int fd)
{
	char link[32], path[PATH_MAX];
	ssize_t length;
	char *end;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	length = readlink(link, path, sizeof(path) - 1);
	if (length <= 0 || path[0] != '/')
		return -1;
	path[length] = '\0';
	end = strrchr(path, '/');
	end[end == path] = '\0';
	return open(path, DIRECTORY_FLAGS);
}

/* Open the root directory of a file's mount. Returns -1 on error. */
static int open_mount_root(int fd, dev_t device)
{
	int directory = open_directory_of(fd);
	struct stat here, above;

	for (int level = 0; directory >= 0 && level < LEVELS_MAX; level++) {
		int parent = openat(directory, "..", DIRECTORY_FLAGS);

		if (parent < 0 || fstat(directory, &here) || fstat(parent, &above) ||
		    here.st_dev != device) {
			close(directory);
			directory = -1;
		} else if (above.st_dev != device || above.st_ino == here.st_ino) {
			close(parent);
			return directory;
		} else {
			close(directory);
			directory = parent;
			continue;
		}
		if (parent >= 0)
			close(parent);
	}
	if (directory >= 0)
		close(directory);
	return -1;
}

uint64_t pf_source_committed(int32_t fd, const uint64_t *ours, uint32_t count, uint64_t *inodes)
{
	struct walk walk = { .ours = ours, .our_count = count, .inodes = 1 };
	struct stat status;
	int root;
	bool complete;

	*inodes = 0;
	if (fstat(fd, &status))
		return HEADROOM_UNLIMITED;
	walk.device = status.st_dev;
	root = open_mount_root(fd, status.st_dev);
	if (root < 0)
		return HEADROOM_UNLIMITED;
	complete = walk_directory(&walk, root, LEVELS_MAX);
	close(root);
	*inodes = walk.inodes;
	return complete ? walk.committed : HEADROOM_UNLIMITED;
}
