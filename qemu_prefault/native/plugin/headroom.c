// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "headroom.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { CGROUP_LEVELS = 16 };

static int meminfo_fd = -1;
static struct {
	int limit_fd, usage_fd;
} cgroups[CGROUP_LEVELS];
static int cgroup_count;

static uint64_t read_number(int fd, const char *behind)
{
	char text[4096];
	ssize_t length = pread(fd, text, sizeof(text) - 1, 0);
	const char *found = text;

	if (length <= 0)
		return UINT64_MAX;
	text[length] = '\0';
	if (behind) {
		found = strstr(text, behind);
		if (!found)
			return UINT64_MAX;
		found += strlen(behind);
	}
	if (!strncmp(found, "max", 3))
		return UINT64_MAX;
	return strtoull(found, NULL, 10);
}

uint64_t pf_headroom(void)
{
	uint64_t least = UINT64_MAX;

	if (meminfo_fd >= 0) {
		uint64_t kib = read_number(meminfo_fd, "MemAvailable:");

		if (kib < UINT64_MAX >> 10)
			least = kib << 10;
	}
	for (int i = 0; i < cgroup_count; i++) {
		uint64_t limit = read_number(cgroups[i].limit_fd, NULL);
		uint64_t usage = read_number(cgroups[i].usage_fd, NULL);

		if (limit != UINT64_MAX && usage != UINT64_MAX) {
			uint64_t left = limit > usage ? limit - usage : 0;

			least = left < least ? left : least;
		}
	}
	return least;
}

/* Every level from our cgroup up to the root may have a limit. */
static void open_cgroup(const char *root, char *path, const char *limit, const char *usage)
{
	char name[4600];

	while (cgroup_count < CGROUP_LEVELS) {
		snprintf(name, sizeof(name), "%s%s/%s", root, path, limit);
		int limit_fd = open(name, O_RDONLY | O_CLOEXEC);

		snprintf(name, sizeof(name), "%s%s/%s", root, path, usage);
		int usage_fd = open(name, O_RDONLY | O_CLOEXEC);

		if (limit_fd >= 0 && usage_fd >= 0) {
			cgroups[cgroup_count].limit_fd = limit_fd;
			cgroups[cgroup_count++].usage_fd = usage_fd;
		} else {
			if (limit_fd >= 0)
				close(limit_fd);
			if (usage_fd >= 0)
				close(usage_fd);
		}
		char *slash = strrchr(path, '/');

		if (!slash)
			return;
		*slash = '\0';
	}
}

void pf_headroom_open(void)
{
	char line[4200];

	for (int i = 0; i < cgroup_count; i++) { /* another process's, after a fork */
		close(cgroups[i].limit_fd);
		close(cgroups[i].usage_fd);
	}
	cgroup_count = 0;
	if (meminfo_fd < 0)
		meminfo_fd = open("/proc/meminfo", O_RDONLY | O_CLOEXEC);
	FILE *file = fopen("/proc/self/cgroup", "re");

	if (!file)
		return;
	while (fgets(line, sizeof(line), file)) { /* hierarchy:controllers:path */
		char *controllers = strchr(line, ':');
		char *path = controllers ? strchr(controllers + 1, ':') : NULL;

		if (!path)
			continue;
		*path++ = '\0';
		path[strcspn(path, "\n")] = '\0';
		if (!strcmp(path, "/"))
			*path = '\0';
		if (!controllers[1])
			open_cgroup("/sys/fs/cgroup", path, "memory.max", "memory.current");
		else if (!strcmp(controllers + 1, "memory"))
			open_cgroup("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes",
				    "memory.usage_in_bytes");
	}
	fclose(file);
}
