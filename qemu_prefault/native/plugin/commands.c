// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "commands.h"

#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "batch.h"
#include "errors.h"
#include "event_log.h"
#include "options.h"
#include "queue.h"
#include "quirk.h"
#include "state.h"
#include "status.h"

enum { MAX_RANGES = 1 << 20 };

static void set_paused(bool wanted)
{
	pthread_mutex_lock(&pf_lock);
	pf_paused = wanted;
	if (!wanted) {
		pf_options.keep = true;
		if (pf_guest_started && pf_capable && pf_quirk == QUIRK_UNDECIDED)
			pf_quirk_decide();
		for (size_t i = 0; i < pf_memslot_count; i++)
			if (pf_memslots[i].state == SLOT_KEPT)
				pf_queue_memslot(&pf_memslots[i]);
	}
	pf_log_event(wanted ? "held" : "released", "requested", "%s", "");
	pf_queue_update();
	pthread_mutex_unlock(&pf_lock);
}

static void set_populate(enum populate populate)
{
	pthread_mutex_lock(&pf_lock);
	pf_options.populate = populate;
	pthread_mutex_unlock(&pf_lock);
}

/* Queue all memslots. Returns the number of pending bytes. */
static uint64_t prefault_all(void)
{
	uint64_t bytes;

	pthread_mutex_lock(&pf_lock);
	for (size_t i = 0; i < pf_memslot_count; i++)
		if (pf_memslots[i].state == SLOT_KEPT)
			pf_queue_memslot(&pf_memslots[i]);
	bytes = pf_queue_pending_bytes();
	pf_queue_update();
	pthread_cond_broadcast(&pf_changed);
	pthread_mutex_unlock(&pf_lock);
	return bytes;
}

static bool gone(int fd)
{
	struct pollfd poll_fd = { .fd = fd, .events = POLLRDHUP };

	return poll(&poll_fd, 1, 0) > 0;
}

static void answer_error(FILE *out, enum request_error error)
{
#define REQUEST_ERROR_ROW(name, code, text) [REQUEST_##name] = { code, text },
	static const struct {
		const char *code, *text;
	} rows[] = { REQUEST_ERRORS(REQUEST_ERROR_ROW) };
#undef REQUEST_ERROR_ROW

	fprintf(out, "{\"error\":\"%s\",\"code\":\"%s\"}\n", rows[error].text, rows[error].code);
	fflush(out);
}

int pf_command_no_thread(char reply[PF_REPLY], const char *clause)
{
	char escaped[2 * PF_CLAUSE];

	pf_json_escape(escaped, sizeof(escaped), clause);
	return snprintf(reply, PF_REPLY,
			"{\"error\":\"the plugin starts no thread for this request, because %s\","
			"\"code\":\"no-thread\"}\n",
			escaped);
}

static void follow(FILE *out)
{
	uint64_t sequence = pf_last_event();
	char line[512];

	fprintf(out, "{\"ok\":true}\n");
	while (!fflush(out) && !gone(fileno(out)))
		if (pf_next_event(&sequence, line, sizeof(line), 500))
			fprintf(out, "%s\n", line);
}

/*
 * Read count lines "WORKER KIND START SIZE" into ranges[], sorted by worker. Sets where[i] to the
 * index in ranges[] of input line i.
 */
static enum request_error read_ranges(FILE *in, size_t count, struct worker_ranges *assigned,
				      size_t vcpus, struct prefault_range *ranges, size_t *where)
{
	char line[128];
	size_t *worker_of = calloc(count + 1, sizeof(*worker_of));
	struct prefault_range *read = calloc(count + 1, sizeof(*read));
	enum request_error problem = worker_of && read ? REQUEST_OK : REQUEST_NO_MEMORY;
	size_t next = 0;

	for (size_t i = 0; i < count; i++) {
		unsigned int kind;
		char end;

		if (!fgets(line, sizeof(line), in) || ferror(in)) {
			problem = REQUEST_INCOMPLETE;
			break;
		}
		if (problem)
			continue; /* skip the remaining lines of this request */
		if (sscanf(line, "%zu %u %" SCNu64 " %" SCNu64 " %c", &worker_of[i], &kind,
			   &read[i].start, &read[i].size, &end) != 4 ||
		    worker_of[i] >= vcpus || kind > PREFAULT_STAGE2 || read[i].start % 4096 ||
		    read[i].size % 4096)
			problem = REQUEST_BAD_RANGE;
		read[i].kind = kind;
	}
	for (size_t vcpu = 0; !problem && vcpu < vcpus; vcpu++) {
		assigned[vcpu].ranges = &ranges[next];
		for (size_t i = 0; i < count; i++)
			if (worker_of[i] == vcpu) {
				where[i] = next;
				ranges[next++] = read[i];
				assigned[vcpu].count++;
			}
	}
	free(worker_of);
	free(read);
	return problem;
}

/* Return whether the client has sent a whole line. Reading a part of a line would wait. */
static bool has_line(int fd)
{
	char text[64];
	ssize_t size = recv(fd, text, sizeof(text), MSG_PEEK | MSG_DONTWAIT);

	return size == sizeof(text) || (size > 0 && memchr(text, '\n', (size_t)size));
}

/* Report progress until the batch is done. Abort it if the client sends "abort" or disconnects. */
static double attend_batch(int fd, FILE *in, FILE *out)
{
	uint64_t bytes;
	double seconds;
	char line[64];

	while (!pf_batch_done(&bytes, &seconds)) {
		struct pollfd poll_fd = { .fd = fd, .events = POLLIN | POLLRDHUP };

		fprintf(out, "{\"progress\":%" PRIu64 "}\n", bytes);
		if (fflush(out))
			pf_batch_abort();
		if (poll(&poll_fd, 1, seconds < 0.1 ? 5 : 100) <= 0)
			continue;
		if (!(poll_fd.revents & (POLLRDHUP | POLLHUP | POLLERR)) && !has_line(fd)) {
			poll(NULL, 0, 5);
			continue;
		}
		if ((poll_fd.revents & (POLLRDHUP | POLLHUP | POLLERR)) ||
		    !fgets(line, sizeof(line), in) || !strncmp(line, "abort", 5)) {
			pf_batch_abort();
			poll(NULL, 0, 5);
		}
	}
	return seconds;
}

static void handle_work_request(int fd, FILE *in, FILE *out, size_t count, uint64_t chunk_bytes)
{
	size_t vcpus = pf_batch_worker_count();
	struct prefault_range *ranges = calloc(count + 1, sizeof(*ranges));
	struct worker_ranges *assigned = calloc(vcpus + 1, sizeof(*assigned));
	size_t *where = calloc(count + 1, sizeof(*where));
	char clause[PF_CLAUSE], reply[PF_REPLY];
	enum request_error problem =
		ranges && assigned && where ?
			read_ranges(in, count, assigned, vcpus, ranges, where) :
			REQUEST_NO_MEMORY;

	if (!problem && (chunk_bytes < 4096 || chunk_bytes % 4096))
		problem = REQUEST_BAD_CHUNK;
	if (!problem)
		problem = pf_batch_start(assigned, vcpus, chunk_bytes, clause);
	if (problem == REQUEST_NO_THREAD) {
		pf_command_no_thread(reply, clause);
		fputs(reply, out);
		fflush(out);
	} else if (problem) {
		answer_error(out, problem);
	} else {
		fprintf(out, "{\"ok\":true}\n");
		double seconds = attend_batch(fd, in, out);

		pf_batch_end();
		fprintf(out, "{\"done\":[");
		for (size_t i = 0; i < count; i++)
			fprintf(out, "%s[%" PRIu64 ",%d]", i ? "," : "", ranges[where[i]].done,
				ranges[where[i]].error);
		fprintf(out, "],\"seconds\":%.6f}\n", seconds);
		fflush(out);
	}
	free(ranges);
	free(assigned);
	free(where);
}

bool pf_command_answer(int fd, FILE *in, FILE *out, char *line)
{
	size_t count;
	uint64_t chunk_bytes;
	char end;

	line[strcspn(line, "\r\n")] = '\0';
	if (!strcmp(line, "status")) {
		pf_status_print(out);
		fprintf(out, "\n");
	} else if (!strcmp(line, "pause") || !strcmp(line, "resume")) {
		set_paused(line[0] == 'p');
		fprintf(out, "{\"ok\":true}\n");
	} else if (!strcmp(line, "prefault")) {
		fprintf(out, "{\"ok\":true,\"pending\":%" PRIu64 "}\n", prefault_all());
	} else if (!strcmp(line, "follow")) {
		follow(out);
		return false;
	} else if (!strcmp(line, "lend")) {
		pf_batch_lend_vcpus();
		fprintf(out, "{\"ok\":true}\n");
	} else if (sscanf(line, "work %zu %" SCNu64 " %c", &count, &chunk_bytes, &end) == 2 &&
		   count <= MAX_RANGES) {
		pf_batch_lend_vcpus(); /* for clients that do not send "lend" */
		handle_work_request(fd, in, out, count, chunk_bytes);
	} else if (sscanf(line, "work-lent %zu %" SCNu64 " %c", &count, &chunk_bytes, &end) == 2 &&
		   count <= MAX_RANGES) {
		handle_work_request(fd, in, out, count, chunk_bytes);
	} else {
		for (int i = 0; i < 3; i++)
			if (!strncmp(line, "populate ", 9) &&
			    !strcmp(line + 9, pf_populate_names[i])) {
				set_populate((enum populate)i);
				fprintf(out, "{\"ok\":true}\n");
				return !fflush(out);
			}
		answer_error(out, REQUEST_UNKNOWN_REQUEST);
	}
	return !fflush(out);
}
