// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qemu-prefault-plugin.so, which QEMU's -plugin option or LD_PRELOAD loads.
 *
 * The plugin keeps the stage-2 tables of the process's VM filled. The plugin is not a TCG plugin.
 * It uses only the loader of the TCG plugin interface. state.h lists the source files.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "guest_ranges.h"
#include "interpose.h"
#include "messages.h"
#include "options.h"
#include "qemu_memory.h"
#include "state.h"
#include "vm.h"

#define EXPORT __attribute__((visibility("default")))

static bool is_qemu;
static int exit_status;

/*
 * The version of the TCG plugin interface. QEMU rejects a plugin whose version it does not accept
 * (plugin_load(), plugins/loader.c). Until release 8.2, QEMU accepts versions 0 and 1. QEMU 9.0
 * raised the minimum to 2. QEMU 10.0 accepts versions 2 to 4, and QEMU 11.1 accepts only version 7.
 * The plugin works with every version. The constructor sets a version that QEMU accepts, depending
 * on the symbols that QEMU exports.
 */
EXPORT int qemu_plugin_version = 1;

static void report_no_kvm(void)
{
	static atomic_bool printed;

	if (pf_vm_never() && !atomic_exchange(&printed, true))
		fprintf(stderr, "qemu-prefault: this QEMU does not use KVM, so the plugin does not "
				"prefault. Start QEMU with -accel kvm\n");
}

static void vcpu_started(void)
{
	report_no_kvm();
}

static void note_status(int status, void *unused)
{
	(void)unused;
	exit_status = status;
}

__attribute__((constructor)) static void loaded(void)
{
	const char *preload = getenv("LD_PRELOAD");

	/* Identify QEMU by its symbols, because the program can have any name. */
	is_qemu = dlsym(RTLD_DEFAULT, "qemu_plugin_register_vcpu_init_cb") ||
		  dlsym(RTLD_DEFAULT, "qemu_init");
	pf_vm_watch_forks();
	if (dlsym(RTLD_DEFAULT, "qemu_plugin_set_pc"))
		qemu_plugin_version = 7;
	else if (dlsym(RTLD_DEFAULT, "qemu_plugin_scoreboard_new"))
		qemu_plugin_version = 2;
	pf_options.by_preload = preload && strstr(preload, "qemu-prefault-plugin");
	/* With -plugin, QEMU may unload the plugin, but the handler would stay registered. */
	if (pf_options.by_preload)
		on_exit(note_status, NULL);
}

/* If QEMU failed or created no guest, report nothing, because it may be configured to use KVM. */
__attribute__((destructor)) static void unloaded(void)
{
	if (is_qemu && !exit_status && pf_guest_ranges_exist())
		report_no_kvm();
	pf_messages_finish();
}

EXPORT int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv)
{
	void (*register_vcpu_init)(uint64_t, void (*)(void), void *) =
		(void (*)(uint64_t, void (*)(void),
			  void *))dlsym(RTLD_DEFAULT, "qemu_plugin_register_vcpu_init_cb");

	(void)info;
	is_qemu = true;
	if (pf_options.by_preload)
		pf_options_take_environment();
	for (int i = 0; i < argc; i++)
		if (!(pf_vm_fd < 0 ? pf_options_parse : pf_options_parse_late)(argv[i]))
			return -1;
	if (!pf_options.by_preload) {
		if (!pf_interpose_by_got()) {
			fprintf(stderr,
				"qemu-prefault: cannot intercept this QEMU's ioctl() calls. "
				"Start QEMU with qemu-prefault run, which uses LD_PRELOAD\n");
			return -1;
		}
		pf_qemu_memory_learn(); /* QEMU creates memory backends before it loads plugins */
		pf_vm_adopt();
	}
	/* The callback's parameters differ between versions; vcpu_started() uses none. */
	if (register_vcpu_init)
		register_vcpu_init(id, vcpu_started, NULL);
	return 0;
}
