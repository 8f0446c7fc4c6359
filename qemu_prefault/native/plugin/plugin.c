// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qemu-prefault-plugin.so: loaded by QEMU's -plugin, or by LD_PRELOAD.
 *
 * It is no TCG plugin: it stands between QEMU and a few functions of libc. By LD_PRELOAD the
 * dynamic linker puts it there; with -plugin the entries of QEMU's global offset table are
 * pointed here. Either way QEMU's own ioctl() calls tell of every memslot and vCPU.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <link.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "keeper.h"

#define EXPORT __attribute__((visibility("default")))

#define SET_USER_MEMORY_REGION2 0x40a0ae49ul /* Linux 6.8 */
#define USERFAULT_REGISTER 0xc020aa00ul
#define USERFAULT_UNREGISTER 0x8010aa01ul
#define POPULATE_WRITE PREFAULT_MADV_POPULATE_WRITE

static atomic_bool vm_seen;
static bool loaded_as_plugin;

long raw_ioctl(int fd, unsigned long request, void *argument)
{
	return syscall(SYS_ioctl, fd, request, argument);
}

// -- what QEMU calls -----------------------------------------------------------------------

static void vm_created(int fd);

static int ioctl_hook(int fd, unsigned long request, void *argument)
{
	long result;

	switch (request) {
	case KVM_RUN:
		return (int)keeper_run_vcpu(fd);
	case KVM_SET_USER_MEMORY_REGION:
	case SET_USER_MEMORY_REGION2:
		return (int)keeper_change_slot(fd, request, argument);
	case KVM_CREATE_VM:
		result = raw_ioctl(fd, request, argument);
		if (result >= 0)
			vm_created((int)result);
		return (int)result;
	case KVM_CREATE_VCPU:
		result = raw_ioctl(fd, request, argument);
		if (result >= 0)
			keeper_vcpu_created((int)result, (unsigned long)argument);
		return (int)result;
	case KVM_CREATE_DEVICE: {
		const struct kvm_create_device *device = argument;

		result = raw_ioctl(fd, request, argument);
		if (!result && device->type == KVM_DEV_TYPE_VFIO &&
		    !(device->flags & KVM_CREATE_DEVICE_TEST))
			keeper_vfio_seen();
		return (int)result;
	}
	case USERFAULT_REGISTER:
	case USERFAULT_UNREGISTER:
		result = raw_ioctl(fd, request, argument);
		if (!result)
			keeper_userfault(request == USERFAULT_REGISTER);
		return (int)result;
	default:
		return (int)raw_ioctl(fd, request, argument);
	}
}

EXPORT int ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	void *argument;

	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	return ioctl_hook(fd, request, argument);
}

static int madvise_hook(void *start, size_t size, int advice)
{
	int result = (int)syscall(SYS_madvise, start, size, advice);

	if (!result && (advice == MADV_DONTNEED || advice == MADV_REMOVE))
		keeper_discarded((uint64_t)start, size);
	else if (!result && advice == POPULATE_WRITE)
		keeper_populated_by_qemu((uint64_t)start, size);
	return result;
}

static int fallocate_hook(int fd, int mode, off_t offset, off_t length)
{
	int result = (int)syscall(SYS_fallocate, fd, mode, offset, length);

	if (!result && (mode & FALLOC_FL_PUNCH_HOLE))
		keeper_file_discarded(fd);
	return result;
}

/* QEMU reserves addresses, then maps its memory over them: that is what is told. */
static void *mmap_hook(void *start, size_t size, int protection, int flags, int fd, off_t offset)
{
	void *result = (void *)syscall(SYS_mmap, start, size, protection, flags, fd, offset);

	if (result != MAP_FAILED && (flags & MAP_FIXED) && (protection & PROT_WRITE))
		keeper_mapped((uint64_t)result, size, flags & MAP_ANONYMOUS ? -1 : fd, flags);
	return result;
}

/* For LD_PRELOAD. Within this object the names above are used: these may be libc's. */
EXPORT int madvise(void *, size_t, int) __attribute__((alias("madvise_hook")));
EXPORT int fallocate(int, int, off_t, off_t) __attribute__((alias("fallocate_hook")));
EXPORT int fallocate64(int, int, off_t, off_t) __attribute__((alias("fallocate_hook")));
EXPORT void *mmap(void *, size_t, int, int, int, off_t) __attribute__((alias("mmap_hook")));
EXPORT void *mmap64(void *, size_t, int, int, int, off_t) __attribute__((alias("mmap_hook")));

// -- standing in QEMU's way ----------------------------------------------------------------

static const struct {
	const char *name;
	void *function;
} hooks[] = {
	{ "ioctl", ioctl_hook },	   { "madvise", madvise_hook },
	{ "fallocate", fallocate_hook },   { "mmap", mmap_hook },
	{ "fallocate64", fallocate_hook }, { "mmap64", mmap_hook },
};

/* Point one entry of the program's global offset table at us. */
static bool redirect(uint64_t *entry, void *function)
{
	uint64_t page = (uint64_t)entry & ~4095ull;
	uint64_t value = (uint64_t)function;

	/* Read-only after relocation (RELRO); a program without that may write it again. */
	if (mprotect((void *)page, 4096, PROT_READ | PROT_WRITE))
		return false;
	__atomic_store_n(entry, value, __ATOMIC_RELEASE);
	return true;
}

struct tables {
	const Elf64_Sym *symbols;
	const char *names;
	const Elf64_Rela *relocations[2]; /* data, calls */
	size_t sizes[2];
};

static int redirect_program(struct dl_phdr_info *program, size_t size, void *found)
{
	struct tables tables = { 0 };
	uint64_t relro = 0, relro_end = 0;

	(void)size;
	for (int i = 0; i < program->dlpi_phnum; i++) {
		const Elf64_Phdr *header = &program->dlpi_phdr[i];
		const Elf64_Dyn *dynamic = (void *)(program->dlpi_addr + header->p_vaddr);

		if (header->p_type == PT_GNU_RELRO) {
			relro = (program->dlpi_addr + header->p_vaddr) & ~4095ull;
			relro_end = (program->dlpi_addr + header->p_vaddr + header->p_memsz) &
				    ~4095ull;
		}
		if (header->p_type != PT_DYNAMIC)
			continue;
		for (; dynamic->d_tag != DT_NULL; dynamic++) {
			void *address = (void *)dynamic->d_un.d_ptr;

			switch (dynamic->d_tag) {
			case DT_SYMTAB: tables.symbols = address; break;
			case DT_STRTAB: tables.names = address; break;
			case DT_RELA: tables.relocations[0] = address; break;
			case DT_RELASZ: tables.sizes[0] = dynamic->d_un.d_val; break;
			case DT_JMPREL: tables.relocations[1] = address; break;
			case DT_PLTRELSZ: tables.sizes[1] = dynamic->d_un.d_val; break;
			}
		}
	}
	for (int which = 0; tables.symbols && tables.names && which < 2; which++)
		for (size_t i = 0; i < tables.sizes[which] / sizeof(Elf64_Rela); i++) {
			const Elf64_Rela *rela = &tables.relocations[which][i];
			uint64_t type = ELF64_R_TYPE(rela->r_info);
			const Elf64_Sym *symbol = &tables.symbols[ELF64_R_SYM(rela->r_info)];

			if (type != R_X86_64_GLOB_DAT && type != R_X86_64_JUMP_SLOT)
				continue;
			for (size_t hook = 0; hook < sizeof(hooks) / sizeof(*hooks); hook++)
				if (!strcmp(tables.names + symbol->st_name, hooks[hook].name))
					*(int *)found |= redirect((void *)(program->dlpi_addr +
									   rela->r_offset),
								  hooks[hook].function)
							 << hook;
		}
	if (relro)
		mprotect((void *)relro, relro_end - relro, PROT_READ);
	return 1; /* the first one is the program itself */
}

// -- options -------------------------------------------------------------------------------

static bool parse_switch(const char *value, bool *target, const char *on, const char *off)
{
	if (strcmp(value, on) && strcmp(value, off))
		return false;
	*target = !strcmp(value, on);
	return true;
}

static bool parse_populate(const char *value)
{
	for (int i = 0; i < 3; i++)
		if (!strcmp(value, populate_names[i])) {
			options.populate = (enum populate)i;
			return true;
		}
	return false;
}

static bool parse_seconds(const char *value, uint64_t *ns)
{
	char *end;
	double seconds = strtod(value, &end);

	if (end == value || *end || !(seconds >= 0 && seconds <= 1e6))
		return false;
	*ns = (uint64_t)(seconds * 1e9);
	return true;
}

/* "~/PATH": libvirt gives each domain a home of its own, the one place it lets QEMU write to. */
static bool parse_socket(const char *value)
{
	const char *home = "";

	options.socket_off = !strcmp(value, "off");
	if (options.socket_off)
		return true;
	if (!strncmp(value, "~/", 2)) {
		home = getenv("HOME");
		value++;
	}
	if (!home || value[0] != '/' || strlen(home) + strlen(value) >= sizeof(options.socket))
		return false;
	snprintf(options.socket, sizeof(options.socket), "%s%s", home, value);
	return true;
}

/* "key=value"; says what is wrong with it. */
static bool parse_option(const char *text)
{
	const char *value = strchr(text, '=');
	size_t length = value ? (size_t)(value - text) : 0;
	bool fine = false;

#define IS(key) (length == sizeof(key) - 1 && !strncmp(text, key, length))
	if (value) {
		value++;
		if (IS("keep"))
			fine = parse_switch(value, &options.keep, "on", "off");
		else if (IS("log"))
			fine = parse_switch(value, &options.log, "on", "off");
		else if (IS("quirk"))
			fine = parse_switch(value, &options.quirk_disable, "disable", "keep");
		else if (IS("populate"))
			fine = parse_populate(value);
		else if (IS("hold"))
			fine = parse_seconds(value, &options.hold_ns);
		else if (IS("socket"))
			fine = parse_socket(value);
	}
#undef IS
	if (!fine)
		fprintf(stderr,
			"qemu-prefault: '%s' is no option; there are: keep=on|off, "
			"populate=auto|all|resident, quirk=disable|keep, hold=SECONDS, "
			"socket=/PATH|~/PATH|off, log=on|off\n",
			text);
	return fine;
}

static void parse_environment(const char *text)
{
	char *copy = strdup(text), *rest = copy, *word;

	while (copy && (word = strsep(&rest, ",")))
		if (*word)
			parse_option(word);
	free(copy);
}

// -- being loaded --------------------------------------------------------------------------

/*
 * QEMU loads a plugin only if this is in its range: 0 to 1 until 8.2, 2 on from 9.0 (4 in
 * 10.0), 7 in 11.1. We use nothing of that interface, so what counts is to name a number
 * this QEMU knows; its symbols tell its age before it reads this.
 */
EXPORT int qemu_plugin_version = 1;

static void vm_created(int fd)
{
	char *preload = getenv("LD_PRELOAD");

	atomic_store(&vm_seen, true);
	/* This is the program it was meant for: what it starts need not load it. */
	if (options.by_preload && preload && strstr(preload, "qemu-prefault-plugin") &&
	    !strpbrk(preload, ": "))
		unsetenv("LD_PRELOAD");
	keeper_vm_created(fd);
}

/* The plugin came when QEMU had its VM already. */
static void adopt_vm(void)
{
	char name[64], target[64];

	for (int fd = 3; fd < 256 && !atomic_load(&vm_seen); fd++) {
		snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
		ssize_t length = readlink(name, target, sizeof(target) - 1);

		if (length > 0 && !strncmp(target, "anon_inode:kvm-vm", 17) && length == 17)
			vm_created(fd);
	}
}

static void say_if_no_vm(void)
{
	if (!atomic_load(&vm_seen))
		fprintf(stderr, "qemu-prefault: this QEMU does not use KVM: there is nothing to "
				"prefault\n");
}

static void vcpu_started(void)
{
	static atomic_bool told;

	if (!atomic_exchange(&told, true))
		say_if_no_vm();
}

static bool program_is_qemu(void)
{
	return !strncmp(program_invocation_short_name, "qemu-system-", 12) ||
	       !strcmp(program_invocation_short_name, "qemu") ||
	       !strcmp(program_invocation_short_name, "kvm");
}

__attribute__((constructor)) static void loaded(void)
{
	const char *preload = getenv("LD_PRELOAD");
	const char *text = getenv("QEMU_PREFAULT_OPTIONS");

	if (dlsym(RTLD_DEFAULT, "qemu_plugin_set_pc"))
		qemu_plugin_version = 7;
	else if (dlsym(RTLD_DEFAULT, "qemu_plugin_scoreboard_new"))
		qemu_plugin_version = 2;
	options.by_preload = preload && strstr(preload, "qemu-prefault-plugin");
	if (options.by_preload && text && program_is_qemu())
		parse_environment(text);
}

__attribute__((destructor)) static void unloaded(void)
{
	if (options.by_preload && !loaded_as_plugin && program_is_qemu())
		say_if_no_vm();
}

EXPORT int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv)
{
	void (*register_vcpu_init)(uint64_t, void (*)(void), void *) =
		(void (*)(uint64_t, void (*)(void), void *))dlsym(
			RTLD_DEFAULT, "qemu_plugin_register_vcpu_init_cb");
	int redirected = 0;

	(void)info;
	loaded_as_plugin = true;
	for (int i = 0; i < argc; i++)
		if (!parse_option(argv[i]))
			return -1;
	if (!options.by_preload) {
		dl_iterate_phdr(redirect_program, &redirected);
		if (!(redirected & 1)) {
			fprintf(stderr, "qemu-prefault: this QEMU calls ioctl() in a way not "
					"known; use LD_PRELOAD (qemu-prefault run)\n");
			return -1;
		}
		keeper_learn_memory(); /* backends are made before plugins are loaded */
		adopt_vm();
	}
	/* The callback's arguments differ between versions; it takes none. */
	if (register_vcpu_init)
		register_vcpu_init(id, vcpu_started, NULL);
	return 0;
}
