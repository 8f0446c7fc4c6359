// SPDX-License-Identifier: GPL-2.0-or-later
#include "prefault_vcpu.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "event_log.h"
#include "limits.h"
#include "messages.h"
#include "options.h"

#define MAX_CPUID_ENTRIES 256 /* KVM_MAX_CPUID_ENTRIES, arch/x86/include/asm/kvm_host.h */
#define MAX_ID 254	      /* an xAPIC id has 8 bits; AVIC has no table entry for larger ids */

#define MSR_TSC 0x10
#define MSR_APIC_BASE 0x1b
#define APIC_BASE_ENABLE (1u << 11)
#define MSR_HYPERV_VP_INDEX 0x40000002
#define HYPERV_INTERFACE_LEAF 0x40000001
#define HYPERV_INTERFACE 0x31237648 /* "Hv#1" */

enum { NORMAL, SMM, PREFAULT_VCPUS };

static struct vcpu vcpus[PREFAULT_VCPUS];
static atomic_int created; /* vcpus[0] to vcpus[created - 1] have a descriptor */
static atomic_int usable;  /* vcpus[0] to vcpus[usable - 1] can prefault */

static bool encrypted;
static char refused[PF_CLAUSE]; /* why the plugin creates none; "": not refused */
static unsigned long first_id;	/* QEMU's limit of vCPU ids; 0: unknown */
static unsigned int id_count;	/* ids from first_id that KVM accepts and QEMU cannot use */
static const char *no_id = "QEMU has not limited its vCPU ids"; /* why id_count is 0 */
static unsigned long tsc_khz; /* the last value that QEMU has set; 0: none */
static struct {
	struct kvm_cpuid2 head;
	struct kvm_cpuid_entry2 entries[MAX_CPUID_ENTRIES];
} cpuid; /* of QEMU's first vCPU */

long pf_prefault_vcpus_enable_cap(int vm_fd, struct kvm_enable_cap *cap)
{
	struct kvm_enable_cap raised = *cap;
	uint64_t limit = cap->args[0];
	unsigned int count = PREFAULT_VCPUS;

	if (limit > MAX_ID)
		no_id = "no vCPU id is free";
	if (!limit || limit > MAX_ID || pf_options.vcpu == VCPU_BORROW || !pf_capable || refused[0])
		return pf_raw_ioctl(vm_fd, KVM_ENABLE_CAP, cap);
	no_id = "KVM accepts no vCPU id above QEMU's";
	if (limit + count - 1 > MAX_ID)
		count = (unsigned int)(MAX_ID - limit + 1);
	raised.args[0] = limit + count;
	/* KVM rejects a limit above KVM_MAX_VCPU_IDS, and accepts only the first limit. */
	if (pf_raw_ioctl(vm_fd, KVM_ENABLE_CAP, &raised))
		return pf_raw_ioctl(vm_fd, KVM_ENABLE_CAP, cap);
	first_id = limit;
	id_count = count;
	return 0;
}

void pf_prefault_vcpus_encrypted(void)
{
	encrypted = true;
}

static void set_msr(int fd, uint32_t index, uint64_t value)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} msrs = { .head.nmsrs = 1, .entry = { .index = index, .data = value } };

	pf_raw_ioctl(fd, KVM_SET_MSRS, &msrs);
}

void pf_prefault_vcpus_set_cpuid(int fd, const struct kvm_cpuid2 *set)
{
	if (!pf_vcpu_count || pf_vcpus[0].fd != fd || set->nent > MAX_CPUID_ENTRIES)
		return;
	pthread_mutex_lock(&pf_lock);
	memcpy(&cpuid, set, sizeof(cpuid.head) + set->nent * sizeof(cpuid.entries[0]));
	for (int i = 0; i < atomic_load(&created); i++)
		pf_raw_ioctl(vcpus[i].fd, KVM_SET_CPUID2, &cpuid);
	pthread_mutex_unlock(&pf_lock);
}

void pf_prefault_vcpus_set_msrs(const struct kvm_msrs *msrs, long count)
{
	for (int i = 0; i < atomic_load(&created); i++)
		for (long entry = 0; entry < count; entry++)
			if (msrs->entries[entry].index == MSR_TSC)
				set_msr(vcpus[i].fd, MSR_TSC, msrs->entries[entry].data);
}

void pf_prefault_vcpus_set_tsc_khz(unsigned long khz)
{
	tsc_khz = khz;
	for (int i = 0; i < atomic_load(&created); i++)
		pf_raw_ioctl(vcpus[i].fd, KVM_SET_TSC_KHZ, (void *)khz);
}

static bool has_hyperv(void)
{
	for (uint32_t i = 0; i < cpuid.head.nent; i++)
		if (cpuid.entries[i].function == HYPERV_INTERFACE_LEAF &&
		    cpuid.entries[i].eax == HYPERV_INTERFACE)
			return true;
	return false;
}

/* Return KVM_MAX_VCPUS, which is 1024 or 4096 (CONFIG_KVM_MAX_NR_VCPUS). */
static unsigned int most_vcpus(void)
{
	long most = pf_raw_ioctl(pf_vm_fd, KVM_CHECK_EXTENSION, (void *)KVM_CAP_MAX_VCPUS);

	return most > PREFAULT_VCPUS ? (unsigned int)most : 1024;
}

/*
 * Disable the vCPU's local APIC, so that no interrupt, INIT or SIPI is sent to the vCPU
 * (kvm_apic_present(), arch/x86/kvm/lapic.h).
 */
static bool disable_apic(int fd)
{
	struct kvm_sregs sregs;

	if (pf_raw_ioctl(fd, KVM_GET_SREGS, &sregs))
		return false;
	set_msr(fd, MSR_APIC_BASE, sregs.apic_base & ~(uint64_t)APIC_BASE_ENABLE);
	return !pf_raw_ioctl(fd, KVM_GET_SREGS, &sregs) && !(sregs.apic_base & APIC_BASE_ENABLE);
}

static bool enter_smm(int fd)
{
	struct kvm_vcpu_events events;

	if (pf_raw_ioctl(fd, KVM_GET_VCPU_EVENTS, &events))
		return false;
	events.flags = KVM_VCPUEVENT_VALID_SMM;
	events.smi.smm = 1;
	return !pf_raw_ioctl(fd, KVM_SET_VCPU_EVENTS, &events);
}

void pf_prefault_vcpus_refuse(const char *why)
{
	snprintf(refused, sizeof(refused), "%s", why);
	pf_print_error("qemu-prefault: the plugin creates no prefault vCPUs, but uses the guest's "
		       "vCPUs, because %s\n",
		       why);
}

/* Store and print why KVM_CREATE_VCPU has failed, if a limit of QEMU is the reason. */
static void refuse_for(int error)
{
	if (atomic_load(&created)) /* the first prefault vCPU exists */
		return;
	if (error == EMFILE)
		pf_prefault_vcpus_refuse("QEMU has no free file descriptor. Raise RLIMIT_NOFILE "
					 "(ulimit -n)");
	else if (error == ENFILE)
		pf_prefault_vcpus_refuse("the host has no free file descriptor. Raise fs.file-max");
	else if (error == ENOMEM)
		pf_prefault_vcpus_refuse("the kernel has no memory for a vCPU. Free memory");
}

/* Create one prefault vCPU. If a setting fails, the vCPU remains unused, as KVM cannot remove it. */
static bool create(int number)
{
	struct vcpu *vcpu = &vcpus[number];
	unsigned long id = first_id + (unsigned long)number;
	int fd = (int)pf_raw_ioctl(pf_vm_fd, KVM_CREATE_VCPU, (void *)id);

	if (fd < 0) {
		refuse_for(errno);
		return false;
	}
	void *run = pf_raw_mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);

	*vcpu = (struct vcpu){
		.fd = fd, .id = id, .run = run, .seen_generation = atomic_load(&pf_root_generation)
	};
	atomic_store(&created, number + 1);
	if (tsc_khz)
		pf_raw_ioctl(fd, KVM_SET_TSC_KHZ, (void *)tsc_khz);
	bool set = run != MAP_FAILED && !pf_raw_ioctl(fd, KVM_SET_CPUID2, &cpuid);

	/* At first, the index is the number of vCPUs. A hotplugged vCPU may get the same index. */
	if (has_hyperv())
		set_msr(fd, MSR_HYPERV_VP_INDEX, most_vcpus() - 1 - (unsigned int)number);
	if (!disable_apic(fd) || (number == SMM && !enter_smm(fd)) || !set)
		return false;
	atomic_store(&usable, number + 1);
	return true;
}

static bool has_smm_slots(void)
{
	for (size_t i = 0; i < pf_memslot_count; i++)
		if (pf_memslots[i].id >> 16)
			return true;
	return false;
}

const char *pf_prefault_vcpus_missing(void)
{
	if (atomic_load(&usable))
		return NULL;
	if (pf_options.vcpu == VCPU_BORROW)
		return "vcpu=borrow";
	if (refused[0])
		return refused;
	if (!pf_capable)
		return "this KVM has no KVM_PRE_FAULT_MEMORY";
	if (encrypted)
		return "the guest's memory is encrypted";
	if (!pf_vcpu_count)
		return "the machine has no vCPU";
	if (!id_count)
		return no_id;
	return pf_guest_started ? "KVM refused to create a vCPU" : "the guest has not started";
}

void pf_prefault_vcpus_create(void)
{
	const struct limits_need need = { .descriptors = PREFAULT_VCPUS,
					  .mappings = PREFAULT_VCPUS,
					  .reserve = LIMITS_RESERVE };
	char clause[PF_CLAUSE];
	bool wanted = pf_capable && !encrypted && id_count && cpuid.head.nent && !refused[0] &&
		      pf_options.vcpu != VCPU_BORROW;

	if (wanted && !pf_limits_allow(&need, clause))
		pf_prefault_vcpus_refuse(clause);
	else if (wanted && create(NORMAL) && id_count > SMM && has_smm_slots())
		create(SMM);
	const char *why = pf_prefault_vcpus_missing();

	if (!why) {
		pf_log_event("prefault-vcpus", NULL, ",\"count\":%d", atomic_load(&usable));
		return;
	}
	if (pf_options.vcpu == VCPU_PREFAULT && pf_capable && !refused[0])
		pf_print_error("qemu-prefault: the plugin cannot create prefault vCPUs (%s), so it "
			       "uses the guest's vCPUs\n",
			       why);
	if (pf_capable && (pf_options.background || pf_options.rate))
		pf_print_error("qemu-prefault: %s no effect, because the plugin has no prefault "
			       "vCPUs (%s). Remove this option or its cause\n",
			       !pf_options.rate	      ? "start=background has" :
			       !pf_options.background ? "rate=BYTES has" :
							"start=background and rate=BYTES have",
			       why);
}

void pf_prefault_vcpus_ignored_options(bool *start, bool *rate)
{
	bool missing = pf_guest_started && !atomic_load(&usable);

	*start = missing && pf_options.background;
	*rate = missing && pf_options.rate;
}

struct vcpu *pf_prefault_vcpu(unsigned int address_space)
{
	return address_space < (unsigned int)atomic_load(&usable) ? &vcpus[address_space] : NULL;
}

void pf_prefault_vcpu_renew_root(struct vcpu *vcpu, bool always)
{
	uint64_t generation = atomic_load(&pf_root_generation);

	/* KVM_SET_CPUID2 resets the MMU (kvm_mmu_after_set_cpuid(), arch/x86/kvm/mmu/mmu.c). */
	if (always || vcpu->seen_generation != generation)
		pf_raw_ioctl(vcpu->fd, KVM_SET_CPUID2, &cpuid);
	vcpu->seen_generation = generation;
}
