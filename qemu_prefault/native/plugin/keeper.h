/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The plugin's heart: keeps the stage-2 tables of the one VM in this process filled.
 *
 * It is told of every KVM ioctl of interest by plugin.c. It knows the memslots, and holds a
 * queue of pieces to populate and prefault. The work is done by the vCPU threads, each
 * right before it enters the guest: there its vCPU is out of KVM_RUN, the BQL is not
 * held, and QEMU's own kick (SIG_IPI) gets it out when somebody else needs the vCPU.
 */
#ifndef QEMU_PREFAULT_KEEPER_H
#define QEMU_PREFAULT_KEEPER_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "common/prefault_loop.h"

enum populate { POPULATE_AUTO, POPULATE_ALL, POPULATE_RESIDENT };

struct keeper_options {
	bool keep;		/* prefault by itself */
	bool quirk_disable;	/* KVM_X86_QUIRK_SLOT_ZAP_ALL */
	bool log;		/* events also to stderr */
	bool by_preload;	/* loaded by LD_PRELOAD, not -plugin */
	bool socket_off;
	enum populate populate;
	uint64_t hold_ns;	/* the guest's longest wait at one go, after its start */
	char socket[108];	/* "": the default path */
};

extern struct keeper_options options;
extern const char *const populate_names[3];

/* The system call itself; -1 and errno. */
long raw_ioctl(int fd, unsigned long request, void *argument);

/* A thread that gets none of QEMU's signals. */
bool start_thread(pthread_t *thread, const char *name, void *(*function)(void *));

/* From plugin.c, around QEMU's own calls. */
void keeper_vm_created(int vm_fd);
void keeper_vcpu_created(int vcpu_fd, unsigned long id);
void keeper_vfio_seen(void);
void keeper_userfault(bool registered);
long keeper_change_slot(int vm_fd, unsigned long request, void *region);
long keeper_run_vcpu(int vcpu_fd);
void keeper_learn_memory(void);
void keeper_mapped(uint64_t start, uint64_t size, int fd, int flags);
void keeper_discarded(uint64_t start, uint64_t size);
void keeper_file_discarded(int fd);
void keeper_populated_by_qemu(uint64_t start, uint64_t size);

/* From the control socket. */
void keeper_status(FILE *out);
void keeper_pause(bool paused);
void keeper_set_populate(enum populate populate);
uint64_t keeper_prefault_all(void); /* bytes it will do */

uint64_t keeper_last_event(void);
/* The next event after *sequence, as a line of JSON; false if none came in time. */
bool keeper_next_event(uint64_t *sequence, char *line, size_t size, int timeout_ms);

/* A batch from outside: one share per vCPU index. */
struct share {
	struct prefault_range *ranges;
	size_t count;
};
/* NULL, or why not. One thread per share; every start has its end, after it is done. */
const char *keeper_start_batch(struct share *shares, size_t vcpus, uint64_t chunk_bytes);
bool keeper_batch_done(uint64_t *bytes, double *seconds);
void keeper_abort_batch(void);
void keeper_end_batch(void);
size_t keeper_vcpu_count(void);

#endif
