// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "interpose.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common/prefault_loop.h"
#include "got.h"
#include "memslots.h"
#include "os.h"
#include "prefault_vcpu.h"
#include "qemu_memory.h"
#include "quirk.h"
#include "vcpu.h"
#include "vm.h"

#define EXPORT __attribute__((visibility("default")))

#define SET_USER_MEMORY_REGION2 0x40a0ae49ul /* Linux 6.8 */
#define MEMORY_ENCRYPT_OP 0xc008aebaul
#define USERFAULT_REGISTER 0xc020aa00ul
#define USERFAULT_UNREGISTER 0x8010aa01ul
#define CAP_MAX_VCPU_ID 128
#define POPULATE_WRITE PREFAULT_MADV_POPULATE_WRITE

/*
 * Set while this thread runs plugin code, whose own calls must not enter the hooks again.
 *
 * Allocators call the hooks of madvise(), fallocate() and mmap() with their locks held. These hooks
 * do not allocate. They take pf_lock only for memory that may belong to the guest.
 */
static __thread bool inside __attribute__((tls_model("initial-exec")));

static bool enter(int *error)
{
	if (inside)
		return false;
	*error = errno;
	inside = true;
	return true;
}

static void leave(int error)
{
	inside = false;
	errno = error;
}

static long enable_cap_hook(int fd, struct kvm_enable_cap *cap)
{
	if (fd == pf_vm_fd && cap->cap == CAP_MAX_VCPU_ID)
		return pf_prefault_vcpus_enable_cap(fd, cap);
	return pf_raw_ioctl(fd, KVM_ENABLE_CAP, cap);
}

/* Repeat QEMU's settings of its vCPUs on the prefault vCPUs. */
static long vcpu_setting_hook(int fd, unsigned long request, void *argument)
{
	long result = pf_raw_ioctl(fd, request, argument);
	int error = errno;

	if (request == KVM_SET_MSRS && result > 0)
		pf_prefault_vcpus_set_msrs(argument, result);
	else if (request == KVM_SET_CPUID2 && !result)
		pf_prefault_vcpus_set_cpuid(fd, argument);
	else if (request == KVM_SET_TSC_KHZ && !result)
		pf_prefault_vcpus_set_tsc_khz((unsigned long)argument);
	errno = error;
	return result;
}

static int ioctl_hook(int fd, unsigned long request, void *argument)
{
	long result;
	int error;

	switch ((uint32_t)request) { /* QEMU's wrappers pass it as an int */
	case KVM_RUN:
		return (int)pf_vcpu_run(fd);
	case KVM_SET_USER_MEMORY_REGION:
	case SET_USER_MEMORY_REGION2:
		return (int)pf_memslots_change(fd, request, argument);
	case KVM_CREATE_VM:
		result = pf_raw_ioctl(fd, request, argument);
		if (result >= 0 && enter(&error)) {
			if (argument) /* a confidential guest, whose vCPUs are measured */
				pf_prefault_vcpus_encrypted();
			pf_vm_created((int)result);
			leave(error);
		}
		return (int)result;
	case KVM_ENABLE_CAP:
		return (int)enable_cap_hook(fd, argument);
	case KVM_SET_CPUID2:
	case KVM_SET_MSRS:
	case KVM_SET_TSC_KHZ:
		return (int)vcpu_setting_hook(fd, request, argument);
	case MEMORY_ENCRYPT_OP:
		pf_prefault_vcpus_encrypted();
		return (int)pf_raw_ioctl(fd, request, argument);
	case KVM_CREATE_VCPU:
		result = pf_raw_ioctl(fd, request, argument);
		if (result >= 0)
			pf_vcpu_created((int)result, (unsigned long)argument);
		return (int)result;
	case KVM_CREATE_DEVICE: {
		const struct kvm_create_device *device = argument;

		result = pf_raw_ioctl(fd, request, argument);
		if (!result && device->type == KVM_DEV_TYPE_VFIO &&
		    !(device->flags & KVM_CREATE_DEVICE_TEST))
			pf_quirk_vfio_seen();
		return (int)result;
	}
	case USERFAULT_REGISTER:
	case USERFAULT_UNREGISTER:
		result = pf_raw_ioctl(fd, request, argument);
		if (!result && enter(&error)) {
			const struct uffdio_register *range = argument;

			pf_qemu_memory_userfault(
				fd, (uint32_t)request == USERFAULT_REGISTER ? range->mode : 0);
			leave(error);
		}
		return (int)result;
	default:
		return (int)pf_raw_ioctl(fd, request, argument);
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
	int result = (int)syscall(SYS_madvise, start, size, advice), error;

	if (result || !enter(&error))
		return result;
	if (advice == MADV_DONTNEED || advice == MADV_REMOVE)
		pf_qemu_memory_discarded((uint64_t)start, size);
	else if (advice == POPULATE_WRITE)
		pf_qemu_memory_populated((uint64_t)start, size);
	leave(error);
	return result;
}

static int fallocate_hook(int fd, int mode, off_t offset, off_t length)
{
	int result = (int)syscall(SYS_fallocate, fd, mode, offset, length), error;

	if (!result && (mode & FALLOC_FL_PUNCH_HOLE) && enter(&error)) {
		pf_qemu_memory_file_discarded(fd);
		leave(error);
	}
	return result;
}

/* Track only MAP_FIXED: QEMU reserves addresses first, and then maps memory with MAP_FIXED. */
static void *mmap_hook(void *start, size_t size, int protection, int flags, int fd, off_t offset)
{
	void *result = pf_raw_mmap(start, size, protection, flags, fd, offset);
	int error;

	if (result != MAP_FAILED && (flags & MAP_FIXED) && (protection & PROT_WRITE) &&
	    enter(&error)) {
		pf_qemu_memory_mapped((uint64_t)result, size, flags & MAP_ANONYMOUS ? -1 : fd,
				      flags);
		leave(error);
	}
	return result;
}

/* For LD_PRELOAD. The plugin itself must not call these functions by name: see os.h. */
EXPORT int madvise(void *, size_t, int) __attribute__((alias("madvise_hook")));
EXPORT int fallocate(int, int, off_t, off_t) __attribute__((alias("fallocate_hook")));
EXPORT int fallocate64(int, int, off_t, off_t) __attribute__((alias("fallocate_hook")));
EXPORT void *mmap(void *, size_t, int, int, int, off_t) __attribute__((alias("mmap_hook")));
EXPORT void *mmap64(void *, size_t, int, int, int, off_t) __attribute__((alias("mmap_hook")));

static const struct got_entry interposed[] = {
	{ "ioctl", ioctl_hook }, { "madvise", madvise_hook },	    { "fallocate", fallocate_hook },
	{ "mmap", mmap_hook },	 { "fallocate64", fallocate_hook }, { "mmap64", mmap_hook },
};

bool pf_interpose_by_got(void)
{
	/* Bit 0 is ioctl(), without which the plugin cannot work. */
	return pf_got_redirect(interposed, sizeof(interposed) / sizeof(*interposed)) & 1;
}
