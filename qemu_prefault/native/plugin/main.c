// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qemu-prefault-plugin.so: loaded by QEMU's -plugin, or by LD_PRELOAD.
 *
 * It is no TCG plugin: it uses QEMU's loader and nothing else of that interface, and keeps the
 * stage-2 tables of the one VM in this process filled. state.h lists the files.
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
#include "options.h"
#include "qemu_memory.h"
#include "vm.h"

#define EXPORT __attribute__((visibility("default")))

static bool is_qemu;
static int exit_status;

/*
 * QEMU loads a plugin only if this is in its range: 0 to 1 until 8.2, 2 on from 9.0 (4 in
 * 10.0), 7 in 11.1. We use nothing of that interface, so what counts is to name a number
 * this QEMU knows; its symbols tell its age before it reads this.
 */
EXPORT int qemu_plugin_version = 1;

static void say_if_no_vm(void)
{
	static atomic_bool told;

	if (pf_vm_never() && !atomic_exchange(&told, true))
		fprintf(stderr, "qemu-prefault: this QEMU does not use KVM: there is nothing to "
				"prefault\n");
}

static void vcpu_started(void)
{
	say_if_no_vm();
}

static void note_status(int status, void *unused)
{
	(void)unused;
	exit_status = status;
}

__attribute__((constructor)) static void loaded(void)
{
	const char *preload = getenv("LD_PRELOAD");

	/* By what it exports, whatever it is called; shells and wrappers have nothing to say. */
	is_qemu = dlsym(RTLD_DEFAULT, "qemu_plugin_register_vcpu_init_cb") ||
		  dlsym(RTLD_DEFAULT, "qemu_init");
	pf_vm_watch_forks();
	if (dlsym(RTLD_DEFAULT, "qemu_plugin_set_pc"))
		qemu_plugin_version = 7;
	else if (dlsym(RTLD_DEFAULT, "qemu_plugin_scoreboard_new"))
		qemu_plugin_version = 2;
	pf_options.by_preload = preload && strstr(preload, "qemu-prefault-plugin");
	if (pf_options.by_preload) /* else QEMU may unload us, which this would not know */
		on_exit(note_status, NULL);
}

/* Not for one that failed, or only printed its version: it may have been about to use KVM. */
__attribute__((destructor)) static void unloaded(void)
{
	if (is_qemu && !exit_status && pf_guest_ranges_exist())
		say_if_no_vm();
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
		if (!pf_options_parse(argv[i]))
			return -1;
	if (!pf_options.by_preload) {
		if (!pf_interpose_by_got()) {
			fprintf(stderr, "qemu-prefault: this QEMU calls ioctl() in a way not "
					"known; use LD_PRELOAD (qemu-prefault run)\n");
			return -1;
		}
		pf_qemu_memory_learn(); /* backends are made before plugins are loaded */
		pf_vm_adopt();
	}
	/* The callback's arguments differ between versions; it takes none. */
	if (register_vcpu_init)
		register_vcpu_init(id, vcpu_started, NULL);
	return 0;
}
