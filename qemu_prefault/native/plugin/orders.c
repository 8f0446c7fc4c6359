// SPDX-License-Identifier: GPL-2.0-or-later
#include "keeper_state.h"

#include <unistd.h>

const char *const populate_names[3] = { "auto", "all", "resident" };

void keeper_pause(bool wanted)
{
	pthread_mutex_lock(&lock);
	paused = wanted;
	if (!wanted) {
		options.keep = true;
		if (guest_started && capable && quirk == QUIRK_UNDECIDED)
			decide_quirk();
		for (size_t i = 0; i < slot_count; i++)
			if (slots[i].state == SLOT_KEPT)
				queue_slot(&slots[i]);
	}
	event(wanted ? "held" : "released", "asked for", "%s", "");
	update_work();
	pthread_mutex_unlock(&lock);
}

void keeper_set_populate(enum populate populate)
{
	pthread_mutex_lock(&lock);
	options.populate = populate;
	pthread_mutex_unlock(&lock);
}

uint64_t keeper_prefault_all(void)
{
	uint64_t bytes;

	pthread_mutex_lock(&lock);
	for (size_t i = 0; i < slot_count; i++)
		if (slots[i].state == SLOT_KEPT)
			queue_slot(&slots[i]);
	bytes = pending_bytes();
	update_work();
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
	return bytes;
}

static bool has_piece(uint32_t slot)
{
	for (size_t i = 0; i < piece_count; i++)
		if (pieces[i].slot == slot && pieces[i].size)
			return true;
	for (size_t i = 0; i < vcpu_count; i++)
		if (vcpus[i].in_hand.slot == slot && vcpus[i].in_hand.size)
			return true;
	return false;
}

static const char *slot_state(const struct slot *slot)
{
	if (slot->state == SLOT_SKIPPED)
		return "skipped";
	if (slot->state == SLOT_HELD)
		return "held";
	return !guest_started || has_piece(slot->id) ? "pending" : "done";
}

static void print_text(FILE *out, const char *name, const char *text)
{
	if (text)
		fprintf(out, ",\"%s\":\"%s\"", name, text);
	else
		fprintf(out, ",\"%s\":null", name);
}

static const char *json_bool(bool value)
{
	return value ? "true" : "false";
}

void keeper_status(FILE *out)
{
	pthread_mutex_lock(&lock);
	fprintf(out,
		"{\"plugin\":1,\"pid\":%d,\"loaded_by\":\"%s\",\"kvm\":%s,\"pre_fault_memory\":%s,"
		"\"keeping\":%s,\"populate\":\"%s\",\"quirk\":\"%s\"",
		getpid(), options.by_preload ? "preload" : "plugin", json_bool(vm_fd >= 0),
		json_bool(capable), json_bool(options.keep && !paused),
		populate_names[options.populate], quirk_names[quirk]);
	print_text(out, "held", held_reason());
	fprintf(out, ",\"vcpus\":[");
	for (size_t i = 0; i < vcpu_count; i++)
		fprintf(out, "%s{\"id\":%lu,\"fd\":%d,\"tid\":%d,\"running\":%s}", i ? "," : "",
			vcpus[i].id, vcpus[i].fd, vcpus[i].tid,
			json_bool(atomic_load(&vcpus[i].in_guest)));
	fprintf(out, "],\"slots\":[");
	for (size_t i = 0; i < slot_count; i++) {
		const struct slot *slot = &slots[i];

		fprintf(out,
			"%s{\"slot\":%u,\"as\":%u,\"gpa\":%llu,\"size\":%llu,\"hva\":%llu,"
			"\"flags\":%u,\"state\":\"%s\",\"resident_only\":%s,\"prefaulted\":%llu",
			i ? "," : "", slot->id & 0xffff, slot->id >> 16,
			(unsigned long long)slot->gpa, (unsigned long long)slot->size,
			(unsigned long long)slot->hva, slot->flags, slot_state(slot),
			json_bool(slot->resident_only), (unsigned long long)slot->prefaulted);
		print_text(out, "why", slot->why);
		fprintf(out, "}");
	}
	fprintf(out,
		"],\"pending\":%llu,\"counters\":{\"slots_created\":%llu,\"slots_deleted\":%llu,"
		"\"populated\":%llu,\"prefaulted\":%llu,\"again\":%llu,\"stuck\":%llu,"
		"\"errors\":%llu,\"populate_seconds\":%.6f,\"prefault_seconds\":%.6f,"
		"\"again_seconds\":%.6f}}",
		(unsigned long long)pending_bytes(), (unsigned long long)counters.created,
		(unsigned long long)counters.deleted, (unsigned long long)counters.populated,
		(unsigned long long)counters.prefaulted, (unsigned long long)counters.again,
		(unsigned long long)counters.stuck, (unsigned long long)counters.errors,
		(double)counters.populate_ns / 1e9, (double)counters.prefault_ns / 1e9,
		(double)counters.again_ns / 1e9);
	pthread_mutex_unlock(&lock);
}
