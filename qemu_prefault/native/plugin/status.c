// SPDX-License-Identifier: GPL-2.0-or-later
#include "status.h"

#include <stdarg.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "limits.h"
#include "messages.h"
#include "options.h"
#include "pace.h"
#include "prefault_vcpu.h"
#include "queue.h"
#include "state.h"

/*
 * The plugin formats the status with pf_lock held and writes it after it has released pf_lock,
 * because stdio allocates, and because the client may read slowly.
 */
struct text {
	char *bytes;
	size_t length, capacity;
};

static void add(struct text *text, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void add(struct text *text, const char *format, ...)
{
	for (;;) {
		size_t left = text->capacity - text->length;
		va_list arguments;

		va_start(arguments, format);
		int length = vsnprintf(text->bytes ? text->bytes + text->length : NULL, left,
				       format, arguments);

		va_end(arguments);
		if (length < 0)
			return;
		if ((size_t)length < left) {
			text->length += (size_t)length;
			return;
		}
		if (!pf_grow((void **)&text->bytes, &text->capacity, text->capacity, 1))
			return;
	}
}

static bool has_item(uint32_t slot)
{
	for (size_t i = 0; i < pf_queue_length; i++)
		if (pf_queue[i].slot == slot && pf_queue[i].size)
			return true;
	for (size_t i = 0; i < pf_vcpu_count; i++)
		if (pf_vcpus[i].in_progress.slot == slot && pf_vcpus[i].in_progress.size)
			return true;
	const struct vcpu *vcpu = pf_prefault_vcpu(slot >> 16);

	return vcpu && vcpu->in_progress.slot == slot && vcpu->in_progress.size;
}

static const char *slot_state(const struct memslot *slot)
{
	if (slot->state == SLOT_SKIPPED)
		return "skipped";
	if (slot->state == SLOT_HELD)
		return "held";
	return !pf_guest_started || has_item(slot->id) ? "pending" : "done";
}

static void print_text(struct text *out, const char *name, const char *text)
{
	char escaped[2 * PF_CLAUSE];

	if (text) {
		pf_json_escape(escaped, sizeof(escaped), text);
		add(out, ",\"%s\":\"%s\"", name, escaped);
	} else {
		add(out, ",\"%s\":null", name);
	}
}

static const char *json_bool(bool value)
{
	return value ? "true" : "false";
}

/* Print the options that have no effect. */
static void print_ignored(struct text *out)
{
	bool start, rate;

	pf_prefault_vcpus_ignored_options(&start, &rate);
	add(out, ",\"ignored_options\":[%s%s%s]", start ? "\"start\"" : "",
	    start && rate ? "," : "", rate ? "\"rate\"" : "");
}

static void describe(struct text *out)
{
	add(out,
	    "{\"plugin\":1,\"pid\":%d,\"loaded_by\":\"%s\",\"kvm\":%s,\"pre_fault_memory\":%s,"
	    "\"keeping\":%s,\"populate\":\"%s\",\"quirk\":\"%s\"",
	    getpid(), pf_options.by_preload ? "preload" : "plugin", json_bool(pf_vm_fd >= 0),
	    json_bool(pf_capable), json_bool(pf_options.keep && !pf_paused),
	    pf_populate_names[pf_options.populate], pf_quirk_names[pf_quirk]);
	add(out, ",\"booting\":%s,\"lost_messages\":%llu", json_bool(pf_booting),
	    (unsigned long long)pf_messages_lost());
	print_text(out, "held", pf_queue_held_reason());
	print_text(out, "slowed_by", pf_pace_reason());
	add(out, ",\"vcpus\":[");
	for (size_t i = 0; i < pf_vcpu_count; i++)
		add(out, "%s{\"id\":%lu,\"fd\":%d,\"tid\":%d,\"running\":%s}", i ? "," : "",
		    pf_vcpus[i].id, pf_vcpus[i].fd, pf_vcpus[i].tid,
		    json_bool(atomic_load(&pf_vcpus[i].in_guest)));
	add(out, "],\"prefault_vcpus\":[");
	const struct vcpu *vcpu;

	for (unsigned int space = 0; (vcpu = pf_prefault_vcpu(space)); space++)
		add(out, "%s{\"id\":%lu,\"fd\":%d,\"smm\":%s}", space ? "," : "", vcpu->id,
		    vcpu->fd, json_bool(space));
	add(out, "]");
	print_text(out, "no_prefault_vcpus", pf_prefault_vcpus_missing());
	print_ignored(out);
	add(out, ",\"slots\":[");
	for (size_t i = 0; i < pf_memslot_count; i++) {
		const struct memslot *slot = &pf_memslots[i];

		add(out,
		    "%s{\"slot\":%u,\"as\":%u,\"gpa\":%llu,\"size\":%llu,\"hva\":%llu,"
		    "\"flags\":%u,\"state\":\"%s\",\"resident_only\":%s,\"prefaulted\":%llu",
		    i ? "," : "", slot->id & 0xffff, slot->id >> 16, (unsigned long long)slot->gpa,
		    (unsigned long long)slot->size, (unsigned long long)slot->hva, slot->flags,
		    slot_state(slot), json_bool(slot->resident_only),
		    (unsigned long long)slot->prefaulted);
		print_text(out, "why", slot->why);
		add(out, "}");
	}
	add(out,
	    "],\"pending\":%llu,\"counters\":{\"slots_created\":%llu,\"slots_deleted\":%llu,"
	    "\"populated\":%llu,\"prefaulted\":%llu,\"again\":%llu,\"stuck\":%llu,"
	    "\"errors\":%llu,\"populate_seconds\":%.6f,\"prefault_seconds\":%.6f,"
	    "\"again_seconds\":%.6f}}",
	    (unsigned long long)pf_queue_pending_bytes(), (unsigned long long)pf_counters.created,
	    (unsigned long long)pf_counters.deleted, (unsigned long long)pf_counters.populated,
	    (unsigned long long)pf_counters.prefaulted, (unsigned long long)pf_counters.again,
	    (unsigned long long)pf_counters.stuck, (unsigned long long)pf_counters.errors,
	    (double)pf_counters.populate_ns / 1e9, (double)pf_counters.prefault_ns / 1e9,
	    (double)pf_counters.again_ns / 1e9);
}

void pf_status_print(FILE *out)
{
	struct text text = { 0 };

	pthread_mutex_lock(&pf_lock);
	describe(&text);
	pthread_mutex_unlock(&pf_lock);
	if (!text.bytes)
		return;
	fwrite(text.bytes, 1, text.length, out);
	syscall(SYS_munmap, text.bytes, text.capacity);
}
