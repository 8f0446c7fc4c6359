// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "headroom.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NO_LIMIT (1ull << 62) /* cgroup v1 reports "no limit" as LONG_MAX rounded down to a page */
#define DIGITS_MAX 19
#define INITIAL_NAMESPACE "cgroup:[4026531835]" /* PROC_CGROUP_INIT_INO (linux/proc_ns.h) */

static bool read_text(int fd, char *text, size_t size)
{
	ssize_t length = fd < 0 ? -1 : pread(fd, text, size - 1, 0);

	if (length <= 0)
		return false;
	text[length] = '\0';
	return true;
}

static bool is_space(char c)
{
	return c == ' ' || (c >= '\t' && c <= '\r');
}

/* Parse a decimal number that is followed by white space or the end of the text. */
static bool parse_number(const char *text, uint64_t *number)
{
	size_t digits = strspn(text, "0123456789");

	if (!digits || digits > DIGITS_MAX || (text[digits] && !is_space(text[digits])))
		return false;
	*number = strtoull(text, NULL, 10);
	return true;
}

/* Read a file that contains one number. Returns false if it is not readable or contains "max". */
static bool read_number(int fd, uint64_t *number)
{
	char text[64];
	uint64_t found;

	if (!read_text(fd, text, sizeof(text)))
		return false;
	text[strcspn(text, "\n")] = '\0';
	if (!parse_number(text, &found) || strchr(text, ' '))
		return false;
	*number = found;
	return true;
}

static bool read_number_at(int directory, const char *name, uint64_t *number)
{
	int fd = openat(directory, name, O_RDONLY | O_CLOEXEC);
	bool found = read_number(fd, number);

	if (fd >= 0)
		close(fd);
	return found;
}

/* Read the number after a key at the start of a line, as in memory.stat and /proc/meminfo. */
static bool read_value(int fd, const char *key, uint64_t *number)
{
	char text[8192];
	size_t length = strlen(key);

	if (!read_text(fd, text, sizeof(text)))
		return false;
	for (const char *line = text; line; line = strchr(line, '\n')) {
		line += *line == '\n';
		if (strncmp(line, key, length) || !is_space(line[length]))
			continue;
		return parse_number(line + length + strspn(line + length, " \t"), number);
	}
	return false;
}

static uint64_t left_of(uint64_t limit, uint64_t usage)
{
	return limit > usage ? limit - usage : 0;
}

uint64_t pf_headroom_host(int32_t meminfo_fd)
{
	uint64_t kib;

	return read_value(meminfo_fd, "MemAvailable:", &kib) ? kib << 10 : HEADROOM_UNLIMITED;
}

uint64_t pf_headroom_commit(int32_t overcommit_fd, int32_t meminfo_fd)
{
	uint64_t mode, limit, committed;

	if (!read_number(overcommit_fd, &mode) || mode != 2 ||
	    !read_value(meminfo_fd, "CommitLimit:", &limit) ||
	    !read_value(meminfo_fd, "Committed_AS:", &committed))
		return HEADROOM_UNLIMITED;
	return left_of(limit, committed) << 10;
}

static bool has_word(const char *list, const char *word)
{
	size_t length = strlen(word);

	for (; list; list = strchr(list, ',')) {
		list += *list == ',';
		if (!strncmp(list, word, length) && (!list[length] || list[length] == ','))
			return true;
	}
	return false;
}

/*
 * Find the process's path in the controller's v1 hierarchy, or in the v2 hierarchy if the
 * controller has no v1 hierarchy.
 */
static bool find_path(const char *cgroup_file, const char *controller, char *path, size_t size,
		      int32_t *unified)
{
	FILE *file = fopen(cgroup_file, "re");
	char *line = NULL;
	size_t capacity = 0;
	bool found = false;

	*unified = 1;
	while (file && getline(&line, &capacity, file) > 0) { /* hierarchy:controllers:path */
		char *controllers = strchr(line, ':');
		char *behind = controllers ? strchr(++controllers, ':') : NULL;

		if (!behind)
			continue;
		*behind++ = '\0';
		/* NOLINTNEXTLINE(clang-analyzer-security.ArrayBound): at most strlen() */
		behind[strcspn(behind, "\n")] = '\0';
		if (*controllers ? !has_word(controllers, controller) : !*unified)
			continue;
		*unified = !*controllers;
		found = (size_t)snprintf(path, size, "%s", behind) < size;
	}
	free(line);
	if (file)
		fclose(file);
	return found;
}

/* show_mountinfo() (fs/proc_namespace.c) escapes space, tab, newline, backslash and # in octal. */
static void unescape(char *text)
{
	char *to = text;

	for (const char *from = text; *from; to++) {
		if (from[0] == '\\' && strspn(from + 1, "01234567") >= 3) {
			*to = (char)((from[1] - '0') << 6 | (from[2] - '0') << 3 | (from[3] - '0'));
			from += 4;
		} else {
			*to = *from++;
		}
	}
	*to = '\0';
}

static void strip_slashes(char *text)
{
	size_t length = strlen(text);

	while (length && text[length - 1] == '/')
		text[--length] = '\0';
}

/* Find a cgroup's directory below a mount point. Returns false if the mount lacks the cgroup. */
static bool place(const char *root, const char *point, const char *path,
		  struct headroom_group *group)
{
	size_t length = strlen(root);
	const char *inside = path + length;

	if (strncmp(path, root, length) || (*inside && *inside != '/') || strstr(inside, "/.."))
		return false;
	group->root_length = (uint32_t)strlen(point);
	if ((size_t)snprintf(group->directory, sizeof(group->directory), "%s%s", point, inside) >=
	    sizeof(group->directory))
		return false;
	strip_slashes(group->directory + group->root_length);
	return true;
}

int pf_headroom_find_group(const char *cgroup_file, const char *mountinfo_file,
			   const char *controller, struct headroom_group *group)
{
	char path[sizeof(group->directory)];
	FILE *file;
	char *line = NULL;
	size_t capacity = 0;
	bool found = false;

	if (!find_path(cgroup_file, controller, path, sizeof(path), &group->unified))
		return 0;
	file = fopen(mountinfo_file, "re");
	while (file && !found && getline(&line, &capacity, file) > 0) {
		char *dash = strstr(line, " - "), *rest = line, *root, *point, *kind, *options;

		if (!dash)
			continue;
		*dash = '\0';
		for (int i = 0; i < 3; i++) /* mount ID, parent ID, device */
			strsep(&rest, " ");
		root = strsep(&rest, " ");
		point = strsep(&rest, " ");
		rest = dash + 3;
		/* NOLINTNEXTLINE(clang-analyzer-security.ArrayBound): at most strlen() */
		rest[strcspn(rest, "\n")] = '\0';
		kind = strsep(&rest, " ");
		strsep(&rest, " "); /* source */
		options = rest;
		if (!point || !options || strcmp(kind, group->unified ? "cgroup2" : "cgroup") ||
		    (!group->unified && !has_word(options, controller)))
			continue;
		unescape(root);
		unescape(point);
		strip_slashes(root);
		strip_slashes(point);
		found = place(root, point, path, group);
	}
	free(line);
	if (file)
		fclose(file);
	return found;
}

int pf_headroom_sees_group(const char *cgroup_file, const char *mountinfo_file,
			   const char *namespace_link, const char *controller)
{
	static struct headroom_group group;
	char path[sizeof(group.directory)], link[64];
	ssize_t length = readlink(namespace_link, link, sizeof(link) - 1);
	int32_t unified;
	int directory;

	if (access(cgroup_file, F_OK) && errno == ENOENT) /* a kernel without cgroups */
		return 1;
	link[length > 0 ? length : 0] = '\0';
	if (strcmp(link, INITIAL_NAMESPACE) ||
	    !find_path(cgroup_file, controller, path, sizeof(path), &unified))
		return 0;
	if (!strcmp(path, "/"))
		return 1;
	if (!pf_headroom_find_group(cgroup_file, mountinfo_file, controller, &group))
		return 0;
	directory = open(group.directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (directory >= 0)
		close(directory);
	return directory >= 0;
}

int pf_headroom_parent(struct headroom_group *group)
{
	char *slash = strrchr(group->directory + group->root_length, '/');

	if (!slash)
		return 0;
	*slash = '\0';
	return 1;
}

static bool exists(int directory, const char *name)
{
	return !faccessat(directory, name, R_OK, 0);
}

int pf_headroom_open_group(const struct headroom_group *group)
{
	int directory = open(group->directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	const char *max = group->unified ? "memory.max" : "memory.limit_in_bytes";
	const char *usage = group->unified ? "memory.current" : "memory.usage_in_bytes";

	if (directory >= 0 &&
	    (!exists(directory, usage) ||
	     (!exists(directory, max) && !(group->unified && exists(directory, "memory.high"))))) {
		close(directory); /* the root cgroup has no limit files */
		directory = -1;
	}
	return directory;
}

/* Open a file of a cgroup. Sets *denied if the file may exist. */
static int open_file(int directory, const char *name, bool *denied)
{
	int fd = openat(directory, name, O_RDONLY | O_CLOEXEC);

	*denied |= fd < 0 && errno != ENOENT;
	return fd;
}

/* Read a number as read_number_at(). Sets *denied if the file may exist and cannot be opened. */
static bool read_limit(int directory, const char *name, uint64_t *number, bool *denied)
{
	int fd = open_file(directory, name, denied);
	bool found = read_number(fd, number);

	if (fd >= 0)
		close(fd);
	return found;
}

/*
 * If the usage exceeds memory.high, the kernel does not kill a process, but throttles the thread
 * that populates (mm/memcontrol.c, mem_cgroup_handle_over_high()). If the usage of memsw reaches its
 * limit, the kernel cannot swap and kills a process.
 */
static uint64_t least_left(int directory, bool unified, uint64_t reclaimable, bool *denied)
{
	static const char *const pairs[2][2][2] = {
		{ { "memory.limit_in_bytes", "memory.usage_in_bytes" },
		  { "memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes" } },
		{ { "memory.max", "memory.current" }, { "memory.high", "memory.current" } },
	};
	uint64_t least = HEADROOM_UNLIMITED, limit, usage;

	for (size_t i = 0; i < 2; i++)
		if (read_limit(directory, pairs[unified][i][0], &limit, denied) &&
		    limit < NO_LIMIT &&
		    read_limit(directory, pairs[unified][i][1], &usage, denied) &&
		    left_of(limit + reclaimable, usage) < least)
			least = left_of(limit + reclaimable, usage);
	return least;
}

uint64_t pf_headroom_group(int32_t directory_fd, int32_t unified, uint64_t least)
{
	const char *key = unified ? "inactive_file" : "total_inactive_file";
	bool denied = false;
	uint64_t left = least_left(directory_fd, unified, 0, &denied), reclaimable;

	/* Read memory.stat only if necessary. It is long, and can only increase the result. */
	if (!denied && left < least) {
		int stat = open_file(directory_fd, "memory.stat", &denied);

		if (read_value(stat, key, &reclaimable))
			left = least_left(directory_fd, unified, reclaimable, &denied);
		if (stat >= 0)
			close(stat);
	}
	if (denied)
		return 0;
	return left < least ? left : least;
}

uint64_t pf_headroom_hugetlb_group(int32_t directory_fd, int32_t unified, uint64_t page_size)
{
	static const struct {
		int shift;
		const char *unit;
	} units[] = { { 30, "GB" }, { 20, "MB" }, { 10, "KB" } };
	char limit_name[64], usage_name[64];
	uint64_t limit, usage;
	size_t unit = 0;

	while (unit < 2 && !(page_size >> units[unit].shift))
		unit++;
	snprintf(limit_name, sizeof(limit_name), "hugetlb.%llu%s.%s",
		 (unsigned long long)page_size >> units[unit].shift, units[unit].unit,
		 unified ? "max" : "limit_in_bytes");
	snprintf(usage_name, sizeof(usage_name), "hugetlb.%llu%s.%s",
		 (unsigned long long)page_size >> units[unit].shift, units[unit].unit,
		 unified ? "current" : "usage_in_bytes");
	if (!read_number_at(directory_fd, limit_name, &limit) ||
	    !read_number_at(directory_fd, usage_name, &usage) || limit >= NO_LIMIT)
		return HEADROOM_UNLIMITED;
	return left_of(limit, usage);
}

uint64_t pf_headroom_hugetlb_pool(int32_t directory_fd, uint64_t page_size, uint64_t host)
{
	uint64_t free_pages, overcommit = 0, surplus = 0, more;
	char name[64];
	int pool;

	snprintf(name, sizeof(name), "hugepages-%llukB", (unsigned long long)page_size >> 10);
	pool = openat(directory_fd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (pool < 0)
		return 0;
	if (!read_number_at(pool, "free_hugepages", &free_pages)) {
		close(pool);
		return 0;
	}
	read_number_at(pool, "nr_overcommit_hugepages", &overcommit);
	read_number_at(pool, "surplus_hugepages", &surplus);
	close(pool);
	more = left_of(overcommit, surplus);
	if (more > host / page_size)
		more = host / page_size;
	return (free_pages + more) * page_size;
}
