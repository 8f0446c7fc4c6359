// SPDX-License-Identifier: GPL-2.0-or-later
/* What the user asked for: -plugin's arguments, or QEMU_PREFAULT_OPTIONS. */
#ifndef QEMU_PREFAULT_PLUGIN_OPTIONS_H
#define QEMU_PREFAULT_PLUGIN_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

enum populate { POPULATE_AUTO, POPULATE_ALL, POPULATE_RESIDENT };

/*
 * Changed by: options.c, main.c, while QEMU has neither vCPUs nor memslots. Later guest_start.c and
 * commands.c change populate and keep, under pf_lock.
 */
struct plugin_options {
	bool keep;	    /* prefault by itself */
	bool quirk_disable; /* KVM_X86_QUIRK_SLOT_ZAP_ALL */
	bool log;	    /* events also to stderr */
	bool by_preload;    /* loaded by LD_PRELOAD, not -plugin */
	bool socket_off;
	enum populate populate;
	uint64_t hold_ns; /* the guest's longest wait at one go, after its start */
	char socket[108]; /* "": the default path */
};

extern struct plugin_options pf_options;
extern const char *const pf_populate_names[3];

/* "key=value"; says on stderr what is wrong with it. */
bool pf_options_parse(const char *text);
/*
 * The same for QEMU_PREFAULT_OPTIONS, a list of them separated by commas. Removes the variable:
 * what QEMU starts is not QEMU.
 */
void pf_options_take_environment(void);

#endif
