// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The first process of an L1 in Bochs. Bochs has ATA disks, and the kernel probes them in parallel,
 * so a disk's name differs between boots. This program finds the disks with Debian and with the
 * lab's files by their file systems' labels, names them as QEMU's virtio disks are named, and
 * executes init.c's program.
 *
 * /ata/order lists the modules for the disks, in load order.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* The offset and length of the volume label in ext4's super block (fs/ext4/ext4.h). */
#define LABEL_OFFSET (1024 + 0x78)
#define LABEL_LENGTH 16

static void die(const char *what)
{
	/* channel.py searches the console for "lab-init: fatal". */
	printf("lab-init: fatal: %s: %s\n", what, strerror(errno));
	fflush(stdout);
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static void load_modules(void)
{
	FILE *order = fopen("/ata/order", "re");
	if (!order)
		die("/ata/order");
	char name[256], path[300];
	while (fscanf(order, "%255s", name) == 1) {
		snprintf(path, sizeof(path), "/ata/%s", name);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
			die(path);
		close(fd);
	}
	fclose(order);
}

static int has_label(const char *disk, const char *label)
{
	char found[LABEL_LENGTH + 1] = "";
	int fd = open(disk, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	ssize_t length = pread(fd, found, LABEL_LENGTH, LABEL_OFFSET);
	close(fd);
	return length == LABEL_LENGTH && !strcmp(found, label);
}

static void name_disk(const char *label, const char *name)
{
	for (int i = 0; i < 30000; i++) {
		for (char letter = 'a'; letter <= 'd'; letter++) {
			char disk[] = "/dev/sdX";
			disk[7] = letter;
			if (!has_label(disk, label))
				continue;
			if (symlink(disk, name))
				die(name);
			return;
		}
		nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
	}
	die(label);
}

int main(void)
{
	if (mkdir("/dev", 0755) && errno != EEXIST)
		die("/dev");
	if (mount("dev", "/dev", "devtmpfs", 0, NULL))
		die("/dev");
	load_modules();
	name_disk("lab-root", "/dev/vda");
	name_disk("lab-files", "/dev/vdb");
	/* init.c mounts the same instance of devtmpfs, which holds the links. */
	if (umount("/dev"))
		die("/dev");
	execl("/lab-init", "init", NULL);
	die("/lab-init");
}
