// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "limits.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
	LEVELS_MAX = 16,
	PAGE = 4096,
	VCPUS_MAX = 4096,
	CAP_LOCK = 14,
	CAP_ADMIN = 21,
	CAP_RESOURCE = 24
};

#define INITIAL_USER_NAMESPACE "user:[4026531837]" /* PROC_USER_INIT_INO (linux/proc_ns.h) */

/* One limit, and what must be left of it. */
struct limit {
	const char *unit; /* of the figures */
	const char *name;
	uint64_t need, reserve, most, used;
};

struct answer {
	char *clause;
	uint32_t size;
	uint32_t reserve; /* of limits_need */
};

/* Store the clause about a limit that leaves too little. Return whether it leaves enough. */
static bool fits(const struct limit *limit, struct answer *answer)
{
	uint64_t left = limit->most > limit->used ? limit->most - limit->used : 0;

	if (left >= limit->need + limit->reserve)
		return true;
	snprintf(answer->clause, answer->size,
		 "it needs %llu %s and must leave %llu for QEMU, but %s is %llu, of which %llu are "
		 "in use. Raise this limit",
		 (unsigned long long)limit->need, limit->unit, (unsigned long long)limit->reserve,
		 limit->name, (unsigned long long)limit->most, (unsigned long long)limit->used);
	for (char *at = answer->clause; *at; at++) /* the path of a cgroup can contain any byte */
		if (*at < ' ' || *at > '~')
			*at = '?';
	return false;
}

int32_t pf_limits_read_level(int32_t directory, uint32_t level, const char *name, char *text,
			     uint32_t size)
{
	char path[128];
	size_t at = 0;

	for (; level && at < sizeof(path) - 3; level--, at += 3)
		memcpy(path + at, "../", 3);
	snprintf(path + at, sizeof(path) - at, "%s", name);
	int fd = openat(directory, path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, text, size - 1);

	if (fd >= 0)
		close(fd);
	text[length > 0 ? length : 0] = '\0';
	return (int32_t)length;
}

/* Read the start of a file. Returns false if the file is empty or not readable. */
static bool read_file(int directory, const char *name, char *text, size_t size)
{
	return pf_limits_read_level(directory, 0, name, text, (uint32_t)size) > 0;
}

/* Store the number in a text. Returns false if the text is "max" or not a number. */
static bool parse_number(const char *text, uint64_t *number)
{
	char *end;

	errno = 0;
	*number = strtoull(text, &end, 10);
	return *text >= '0' && *text <= '9' && (*end == '\n' || !*end) && !errno;
}

static bool read_number(int directory, const char *name, uint64_t *number)
{
	char text[32];

	return read_file(directory, name, text, sizeof(text)) && parse_number(text, number);
}

static bool read_level_number(int directory, uint32_t level, const char *name, uint64_t *number)
{
	char text[32];

	return pf_limits_read_level(directory, level, name, text, sizeof(text)) > 0 &&
	       parse_number(text, number);
}

/* Return the start of the value in a line "KEY:\tVALUE" of /proc/PID/status, or NULL. */
static const char *status_value(const char *status, const char *key)
{
	const char *found = strstr(status, key);

	return found ? found + strlen(key) : NULL;
}

/* --- tasks --- */

static bool pids_fit(const struct limits_files *files, uint64_t need, struct answer *answer)
{
	struct headroom_group group = files->group;

	for (uint32_t level = 0; level < LEVELS_MAX; level++) {
		char text[sizeof(group.directory) + sizeof("pids.max of ")];
		struct limit limit = {
			.unit = "tasks", .name = text, .need = need, .reserve = answer->reserve
		};

		snprintf(text, sizeof(text), "pids.max of %s", group.directory);
		if (read_level_number(files->pids, level, "pids.max", &limit.most) &&
		    read_level_number(files->pids, level, "pids.current", &limit.used) &&
		    !fits(&limit, answer))
			return false;
		if (!pf_headroom_parent(&group))
			break;
	}
	return true;
}

/* In another user namespace, neither root nor a capability exempts a process from limits. */
static bool in_initial_user_namespace(const struct limits_files *files)
{
	char link[64];
	ssize_t length = readlinkat(files->proc, "self/ns/user", link, sizeof(link) - 1);

	link[length > 0 ? length : 0] = '\0';
	return !strcmp(link, INITIAL_USER_NAMESPACE);
}

/* Return whether one of two capabilities exempts the process from limits. */
static bool has_capability(const struct limits_files *files, int first, int second)
{
	char status[4096];
	const char *value;

	if (!in_initial_user_namespace(files) ||
	    !read_file(files->proc, "self/status", status, sizeof(status)))
		return false;
	value = status_value(status, "\nCapEff:");
	return value && strtoull(value, NULL, 16) & (1ull << first | 1ull << second);
}

static bool is_root_of_host(const struct limits_files *files)
{
	return getuid() == 0 && in_initial_user_namespace(files);
}

struct directory_entry { /* linux_dirent64 */
	uint64_t inode;
	int64_t offset;
	uint16_t length;
	uint8_t type;
	char name[];
};

static uint64_t tasks_of(int proc, const char *pid, uid_t user)
{
	char name[32], status[4096];
	const char *uid, *threads;

	if (*pid < '0' || *pid > '9' ||
	    (size_t)snprintf(name, sizeof(name), "%s/status", pid) >= sizeof(name) ||
	    !read_file(proc, name, status, sizeof(status)))
		return 0;
	uid = status_value(status, "\nUid:");
	threads = status_value(status, "\nThreads:");
	return uid && threads && strtoull(uid, NULL, 10) == user ? strtoull(threads, NULL, 10) : 0;
}

/* Return the number of threads of all processes of a user. */
static uint64_t tasks_of_user(int proc, uid_t user)
{
	_Alignas(struct directory_entry) char buffer[4096];
	int fd = openat(proc, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	uint64_t count = 0;
	long length;

	while (fd >= 0 && (length = syscall(SYS_getdents64, fd, buffer, sizeof(buffer))) > 0) {
		const struct directory_entry *entry;

		for (long at = 0; at < length; at += entry->length) {
			entry = (const struct directory_entry *)&buffer[at];
			count += tasks_of(proc, entry->name, user);
		}
	}
	if (fd >= 0)
		close(fd);
	return count;
}

/* The limit on the tasks of the user. copy_process() (kernel/fork.c) exempts some processes. */
static bool user_fits(const struct limits_files *files, uint64_t need, uint64_t all,
		      struct answer *answer)
{
	struct rlimit most;
	struct limit limit = { .unit = "tasks",
			       .name = "RLIMIT_NPROC (ulimit -u)",
			       .need = need,
			       .reserve = answer->reserve };

	if (getrlimit(RLIMIT_NPROC, &most) || most.rlim_cur == RLIM_INFINITY)
		return true;
	limit.most = most.rlim_cur;
	limit.used = all;
	if (all && fits(&limit, answer)) /* the user has no more tasks than the host */
		return true;
	if (is_root_of_host(files) || has_capability(files, CAP_ADMIN, CAP_RESOURCE))
		return true;
	limit.used = tasks_of_user(files->proc, getuid());
	return fits(&limit, answer);
}

static bool tasks_fit(const struct limits_files *files, uint64_t need, struct answer *answer)
{
	static const char *const limits[][2] = {
		{ "kernel.threads-max", "sys/kernel/threads-max" },
		{ "kernel.pid_max", "sys/kernel/pid_max" },
	};
	struct limit limit = { .unit = "tasks", .need = need, .reserve = answer->reserve };
	char text[128];
	const char *slash;

	if (!pids_fit(files, need, answer))
		return false;
	/* loadavg_proc_show(), fs/proc/loadavg.c: "0.00 0.00 0.00 RUNNING/ALL LAST" */
	slash = read_file(files->proc, "loadavg", text, sizeof(text)) ? strchr(text, '/') : NULL;
	limit.used = slash ? strtoull(slash + 1, NULL, 10) : 0;
	for (size_t i = 0; slash && i < sizeof(limits) / sizeof(*limits); i++) {
		limit.name = limits[i][0];
		if (read_number(files->proc, limits[i][1], &limit.most) && !fits(&limit, answer))
			return false;
	}
	return user_fits(files, need, limit.used, answer);
}

/* --- descriptors, address space, mappings --- */

/*
 * Count free descriptors from the limit downwards, because the kernel assigns the lowest free one.
 * This needs no file in /proc, and usually only a few system calls.
 */
static bool descriptors_fit(uint64_t need, struct answer *answer)
{
	struct rlimit most;
	uint64_t left = 0, reserve = answer->reserve;

	if (getrlimit(RLIMIT_NOFILE, &most))
		return true;
	for (uint64_t fd = most.rlim_cur < INT32_MAX ? most.rlim_cur : INT32_MAX; fd-- > 0;)
		if (fcntl((int)fd, F_GETFD) < 0 && ++left == need + reserve)
			return true;
	const struct limit limit = { .unit = "descriptors",
				     .name = "RLIMIT_NOFILE (ulimit -n)",
				     .need = need,
				     .reserve = reserve,
				     .most = most.rlim_cur,
				     .used = most.rlim_cur - left };

	return fits(&limit, answer);
}

static bool bytes_fit(int resource, const char *name, uint64_t used, uint64_t need,
		      struct answer *answer)
{
	struct rlimit most;

	if (getrlimit(resource, &most) || most.rlim_cur == RLIM_INFINITY)
		return true;
	/* Round need and use up, and the limit down. */
	const struct limit limit = { .unit = "MiB of address space",
				     .name = name,
				     .need = (need + (1 << 20) - 1) >> 20,
				     .reserve = (uint64_t)LIMITS_TASK_MIB * answer->reserve,
				     .most = most.rlim_cur >> 20,
				     .used = (used + (1 << 20) - 1) >> 20 };

	return fits(&limit, answer);
}

static bool address_space_fits(const struct limits_files *files, uint64_t need,
			       struct answer *answer)
{
	char text[128], *at = text;
	uint64_t pages[6]; /* size resident shared text lib data: proc_pid_statm() */

	if (!read_file(files->proc, "self/statm", text, sizeof(text)))
		return true;
	for (size_t i = 0; i < 6; i++)
		pages[i] = strtoull(at, &at, 10);
	return bytes_fit(RLIMIT_AS, "RLIMIT_AS in MiB (ulimit -v)", pages[0] * PAGE, need,
			 answer) &&
	       bytes_fit(RLIMIT_DATA, "RLIMIT_DATA in MiB (ulimit -d)", pages[5] * PAGE, need,
			 answer) &&
	       (!files->locks_memory || has_capability(files, CAP_LOCK, CAP_LOCK) ||
		bytes_fit(RLIMIT_MEMLOCK, "RLIMIT_MEMLOCK in MiB (ulimit -l)", pages[0] * PAGE,
			  need, answer));
}

static uint64_t count_lines(int directory, const char *name)
{
	int fd = directory < 0 ? -1 : openat(directory, name, O_RDONLY | O_CLOEXEC);
	char text[4096];
	uint64_t lines = 0;
	ssize_t length;

	while (fd >= 0 && (length = read(fd, text, sizeof(text))) > 0)
		for (ssize_t i = 0; i < length; i++)
			lines += text[i] == '\n';
	if (fd >= 0)
		close(fd);
	return lines;
}

static bool mappings_fit(const struct limits_files *files, uint64_t need, struct answer *answer)
{
	struct limit limit = { .unit = "mappings",
			       .name = "vm.max_map_count",
			       .need = need,
			       .reserve = (uint64_t)LIMITS_TASK_MAPPINGS * answer->reserve };

	if (!read_number(files->proc, "sys/vm/max_map_count", &limit.most))
		return true;
	limit.used = count_lines(files->proc, "self/maps");
	return fits(&limit, answer);
}

void pf_limits_find(const char *proc, const char *cgroup_file, const char *mountinfo_file,
		    struct limits_files *files)
{
	files->proc = open(proc, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	files->pids = -1;
	files->locks_memory = 0;
	if (pf_headroom_find_group(cgroup_file, mountinfo_file, "pids", &files->group))
		files->pids = open(files->group.directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

uint32_t pf_limits_vcpus(const char *smp)
{
	uint64_t most = 1, product = 1;

	/* "4,maxcpus=8,sockets=2,cores=2,threads=2": the last three are factors. */
	for (const char *at = smp; at; at = strchr(at, ',')) {
		at += *at == ',';
		const char *value = at + strcspn(at, "=,");
		bool is_total = *value != '=' || !strncmp(at, "cpus=", 5) ||
				!strncmp(at, "maxcpus=", 8);
		uint64_t number = strtoull(*value == '=' ? value + 1 : at, NULL, 10);

		number = number > VCPUS_MAX ? VCPUS_MAX : number;
		if (is_total)
			most = number > most ? number : most;
		else if (number && product <= VCPUS_MAX)
			product *= number;
	}
	most = product > most ? product : most;
	return (uint32_t)(most > VCPUS_MAX ? VCPUS_MAX : most);
}

int pf_limits_check(const struct limits_files *files, const struct limits_need *need, char *clause,
		    uint32_t size)
{
	struct answer answer = { clause, size, need->reserve };

	return (!need->descriptors || descriptors_fit(need->descriptors, &answer)) &&
	       (!need->tasks || tasks_fit(files, need->tasks, &answer)) &&
	       (!need->bytes || address_space_fits(files, need->bytes, &answer)) &&
	       (!need->mappings || mappings_fit(files, need->mappings, &answer));
}
