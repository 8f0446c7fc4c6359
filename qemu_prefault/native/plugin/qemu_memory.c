// SPDX-License-Identifier: GPL-2.0-or-later
#include "qemu_memory.h"

#include <linux/userfaultfd.h>
#include <stddef.h>
#include <sys/stat.h>

#include "event_log.h"
#include "guest_ranges.h"
#include "host_ranges.h"
#include "options.h"
#include "queue.h"
#include "state.h"

/* A userfaultfd of QEMU. Since Linux 5.12, each has an inode of its own. */
struct userfaultfd {
	int fd;
	dev_t device;
	ino_t inode;
	uint64_t modes; /* of all registrations */
	size_t count;	/* registrations */
};

static struct userfaultfd *userfaultfds;
static size_t userfaultfd_count, userfaultfd_capacity;

static bool is_open(const struct userfaultfd *userfaultfd)
{
	struct stat status;

	return !fstat(userfaultfd->fd, &status) && status.st_dev == userfaultfd->device &&
	       status.st_ino == userfaultfd->inode;
}

/* Forget closed descriptors and those without a registration, and update the queue. */
static void update_userfaults(void)
{
	const char *before = pf_queue_held_reason();
	enum userfault use = USERFAULT_NONE;

	for (size_t i = userfaultfd_count; i--;) {
		if (!userfaultfds[i].count || !is_open(&userfaultfds[i]))
			userfaultfds[i] = userfaultfds[--userfaultfd_count];
		else if (userfaultfds[i].modes & ~UFFDIO_REGISTER_MODE_WP)
			use = USERFAULT_POSTCOPY;
		else if (use == USERFAULT_NONE)
			use = USERFAULT_SNAPSHOT;
	}
	pf_userfault = use;
	pf_queue_update();
	if (before != pf_queue_held_reason()) {
		pf_log_event(pf_queue_held_reason() ? "held" : "released", "userfaultfd", "%s", "");
		pthread_cond_broadcast(&pf_changed);
	}
}

static struct userfaultfd *find_userfaultfd(int fd)
{
	for (size_t i = 0; i < userfaultfd_count; i++)
		if (userfaultfds[i].fd == fd)
			return &userfaultfds[i];
	return NULL;
}

void pf_qemu_memory_userfault(int fd, uint64_t modes)
{
	struct stat status;

	pthread_mutex_lock(&pf_lock);
	update_userfaults(); /* the number may belong to another descriptor now */
	struct userfaultfd *found = find_userfaultfd(fd);

	if (!modes && found) {
		found->count--;
	} else if (modes && found) {
		found->count++;
		found->modes |= modes;
	} else if (modes && !fstat(fd, &status) &&
		   pf_grow((void **)&userfaultfds, &userfaultfd_capacity, userfaultfd_count,
			   sizeof(*userfaultfds))) {
		userfaultfds[userfaultfd_count++] = (struct userfaultfd){ .fd = fd,
									  .device = status.st_dev,
									  .inode = status.st_ino,
									  .modes = modes,
									  .count = 1 };
	}
	update_userfaults();
	pthread_cond_broadcast(&pf_changed); /* the watchdog checks the descriptors */
	pthread_mutex_unlock(&pf_lock);
}

void pf_qemu_memory_check_userfaults(void)
{
	if (pf_userfault != USERFAULT_NONE)
		update_userfaults();
}

void pf_qemu_memory_learn(void)
{
	pf_ranges_learn();
}

void pf_qemu_memory_mapped(uint64_t start, uint64_t size, int fd, int flags)
{
	pf_ranges_mapped(start, size, fd, flags);
}

void pf_qemu_memory_discarded(uint64_t start, uint64_t size)
{
	if (!pf_guest_ranges_touch(start, size))
		return;
	pthread_mutex_lock(&pf_lock);
	if (!(pf_ranges_facts(start, size) & MEMORY_HOLES)) {
		bool found = false;

		/* SMM's address space has slots of the same memory. */
		for (size_t i = 0; i < pf_memslot_count; i++) {
			struct memslot *slot = &pf_memslots[i];

			if (start < slot->hva || start >= slot->hva + slot->size)
				continue;
			found = true;
			pf_ranges_discarded(slot->hva, slot->size);
			if (pf_options.populate == POPULATE_AUTO)
				pf_queue_make_resident_only(slot);
		}
		if (!found)
			pf_ranges_discarded(start, size);
	}
	pthread_mutex_unlock(&pf_lock);
}

void pf_qemu_memory_file_discarded(int fd)
{
	if (!pf_guest_ranges_have_file(fd))
		return;
	pthread_mutex_lock(&pf_lock);
	if (pf_ranges_file_discarded(fd) && pf_options.populate == POPULATE_AUTO)
		for (size_t i = 0; i < pf_memslot_count; i++)
			if (!pf_memslots[i].resident_only &&
			    pf_ranges_facts(pf_memslots[i].hva, pf_memslots[i].size) & MEMORY_HOLES)
				pf_queue_make_resident_only(&pf_memslots[i]);
	pthread_mutex_unlock(&pf_lock);
}

/* Called when virtio-mem with prealloc=on plugs a block, or when QEMU preallocates a backend. */
void pf_qemu_memory_populated(uint64_t start, uint64_t size)
{
	if (!pf_guest_ranges_touch(start, size))
		return;
	pthread_mutex_lock(&pf_lock);
	struct memslot *slot = pf_memslot_at_hva(start);

	if (slot && slot->state == SLOT_KEPT && pf_guest_started && slot->resident_only) {
		uint64_t length = slot->hva + slot->size - start;

		pf_queue_add((struct work_item){ .gpa = slot->gpa + (start - slot->hva),
						 .hva = start,
						 .size = size < length ? size : length,
						 .slot = slot->id,
						 .stage2 = true,
						 .resident = true });
		pf_stall_start = 0;
		pf_queue_update();
		pthread_cond_broadcast(&pf_changed);
	}
	pthread_mutex_unlock(&pf_lock);
}
