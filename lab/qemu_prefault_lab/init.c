// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The first process of L1, in an initramfs of a few megabytes. The initramfs of initramfs-tools
 * takes longer to unpack under TCG than this program takes to run.
 *
 * The program loads the modules for the disks and mounts them read-only, with a tmpfs on top.
 * The disks must not change: several labs share them, and a lab's snapshot holds only memory.
 * The program then stays as process 1 to reap orphans.
 *
 * /modules/order lists the modules in load order. /dev/vda holds Debian. /dev/vdb holds the lab's
 * files, which the overlay adds to it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void die(const char *what)
{
	/* channel.py searches the console for "lab-init: fatal". */
	printf("lab-init: fatal: %s: %s\n", what, strerror(errno));
	fflush(stdout);
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static void must_mount(const char *source, const char *target, const char *type,
		       unsigned long flags, const char *options)
{
	if (mkdir(target, 0755) && errno != EEXIST)
		die(target);
	if (mount(source, target, type, flags, options))
		die(target);
}

static void load_modules(void)
{
	FILE *order = fopen("/modules/order", "re");
	if (!order)
		die("/modules/order");
	char name[256], path[300];
	while (fscanf(order, "%255s", name) == 1) {
		snprintf(path, sizeof(path), "/modules/%s", name);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST))
			die(path);
		close(fd);
	}
	fclose(order);
}

static void wait_for(const char *path)
{
	for (int i = 0; access(path, F_OK); i++) {
		if (i == 30000)
			die(path);
		nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
	}
}

int main(void)
{
	if (mkdir("/dev", 0755) && errno != EEXIST)
		die("/dev");
	must_mount("dev", "/dev", "devtmpfs", 0, NULL);
	must_mount("proc", "/proc", "proc", 0, NULL);
	must_mount("sys", "/sys", "sysfs", 0, NULL);
	load_modules();
	wait_for("/dev/vda");
	wait_for("/dev/vdb");

	must_mount("/dev/vda", "/lower", "ext4", MS_RDONLY, "noload");
	must_mount("/dev/vdb", "/files", "ext4", MS_RDONLY, "noload");
	must_mount("rw", "/rw", "tmpfs", 0, "size=90%");
	if (mkdir("/rw/upper", 0755) || mkdir("/rw/work", 0755))
		die("/rw");
	must_mount("root", "/root", "overlay", 0,
		   "lowerdir=/files:/lower,upperdir=/rw/upper,workdir=/rw/work");
	if (mount("/dev", "/root/dev", NULL, MS_MOVE, NULL) ||
	    mount("/proc", "/root/proc", NULL, MS_MOVE, NULL) ||
	    mount("/sys", "/root/sys", NULL, MS_MOVE, NULL))
		die("moving /dev, /proc and /sys");
	if (chdir("/root") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
		die("switching root");

	pid_t child = fork();
	if (child < 0)
		die("fork");
	if (!child) {
		setsid();
		execl("/bin/sh", "sh", "/lab/start.sh", NULL);
		die("/lab/start.sh");
	}
	for (;;) {
		int status;
		pid_t pid = wait(&status);
		if (pid == child) {
			errno = 0;
			printf("lab-init: the command server ended with status %#x\n", status);
			die("no command server");
		}
	}
}
