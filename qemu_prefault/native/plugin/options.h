// SPDX-License-Identifier: GPL-2.0-or-later
/* The user's options: arguments of -plugin, or QEMU_PREFAULT_OPTIONS. */
#ifndef QEMU_PREFAULT_PLUGIN_OPTIONS_H
#define QEMU_PREFAULT_PLUGIN_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

enum populate { POPULATE_AUTO, POPULATE_ALL, POPULATE_RESIDENT };
enum vcpu_choice { VCPU_AUTO, VCPU_PREFAULT, VCPU_BORROW };

/*
 * Changed by: options.c and main.c, while QEMU has neither vCPUs nor memslots. Later, claims.c
 * and commands.c change populate and keep, with pf_lock held.
 */
struct plugin_options {
	bool keep;	    /* prefault automatically */
	bool quirk_disable; /* disable KVM_X86_QUIRK_SLOT_ZAP_ALL */
	bool log;	    /* also print events to stderr */
	bool by_preload;    /* loaded by LD_PRELOAD, not by -plugin */
	bool socket_off;
	bool background; /* start the guest before its memory is prefaulted */
	enum populate populate;
	enum vcpu_choice vcpu;
	uint64_t hold_ns; /* maximum continuous delay of a started guest */
	uint64_t rate;	  /* bytes per second that the plugin's thread processes; 0: no limit */
	char socket[108]; /* "": the default path */
};

extern struct plugin_options pf_options;
extern const char *const pf_populate_names[3];

/* Parse "key=value". If the option is invalid, print an error to stderr and return false. */
bool pf_options_parse(const char *text);
/*
 * Parse an option after the plugin has started in this process, because it was loaded twice. If the
 * option can no longer have an effect, print this to stderr and keep the value in use.
 */
bool pf_options_parse_late(const char *text);
/*
 * Parse the comma-separated options in QEMU_PREFAULT_OPTIONS, and remove this variable, so that
 * QEMU's child processes do not inherit it.
 */
void pf_options_take_environment(void);

#endif
