// SPDX-License-Identifier: GPL-2.0-or-later
#include "state.h"

#include <linux/kvm.h>

pthread_mutex_t pf_lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t pf_changed;

int pf_vm_fd = -1;
bool pf_capable, pf_incoming;

enum quirk_state pf_quirk;
const char *const pf_quirk_names[] = { "undecided", "absent", "kept", "vfio", "disabled" };

bool pf_paused;
enum userfault pf_userfault;

struct memslot *pf_memslots;
size_t pf_memslot_count;
atomic_int pf_slot_changes;
atomic_uint_least64_t pf_root_generation;
uint64_t pf_slot_changed_at;
bool pf_booting;
bool pf_boot_slot_created;
bool pf_flash_slot_created;

struct work_item *pf_queue;
size_t pf_queue_length;
atomic_bool pf_work_available;
uint64_t pf_stall_start;

struct vcpu pf_vcpus[MAX_VCPUS];
atomic_size_t pf_vcpu_count;
bool pf_guest_started, pf_guest_entered;
int pf_in_flight;
atomic_int pf_vcpus_working;
int pf_populating;
bool pf_dirty_ring;

struct counters pf_counters;

struct memslot *pf_find_memslot(uint32_t id)
{
	for (size_t i = 0; i < pf_memslot_count; i++)
		if (pf_memslots[i].id == id)
			return &pf_memslots[i];
	return NULL;
}

struct memslot *pf_memslot_at_gpa(uint64_t gpa)
{
	for (size_t i = 0; i < pf_memslot_count; i++)
		if (!(pf_memslots[i].id >> 16) && pf_memslots[i].gpa <= gpa &&
		    gpa < pf_memslots[i].gpa + pf_memslots[i].size)
			return &pf_memslots[i];
	return NULL;
}

struct memslot *pf_memslot_at_hva(uint64_t hva)
{
	for (size_t i = 0; i < pf_memslot_count; i++)
		if (!(pf_memslots[i].id >> 16) && pf_memslots[i].hva <= hva &&
		    hva < pf_memslots[i].hva + pf_memslots[i].size)
			return &pf_memslots[i];
	return NULL;
}

bool pf_logs_to_ring(void)
{
	for (size_t i = 0; pf_dirty_ring && i < pf_memslot_count; i++)
		if (pf_memslots[i].flags & KVM_MEM_LOG_DIRTY_PAGES &&
		    !pf_memslots[i].created_logged)
			return true;
	return false;
}

void pf_leave_ioctl(void)
{
	pf_in_flight--;
	pthread_cond_broadcast(&pf_changed);
}
