// SPDX-License-Identifier: GPL-2.0-or-later
#include "firmware.h"

#include <linux/kvm.h>

#include "common/prefault_loop.h"
#include "host_ranges.h"
#include "state.h"

#define RESET_VECTOR 0xffff0 /* holds a jump instruction once the firmware is in place */

/*
 * The firmware of pc and q35 copies itself below 1 MiB. During the copy, QEMU deletes and
 * re-creates the low-RAM memslot three times (PAM, hw/pci-host/pam.c). The memslot at 0xf0000 shows
 * the state:
 *
 *   at reset         flash, read-only                      changes will follow
 *   while copying    RAM, in one slot with RAM above 1 MiB changes will follow
 *   finished         RAM, in a read-only slot
 *
 * microvm maps its firmware there as memory and does not change the slots.
 */
bool pf_firmware_at_work(void)
{
	const struct memslot *low = pf_memslot_at_gpa(0), *bios = pf_memslot_at_gpa(0xf0000);

	if (!low || !bios)
		return false;
	if (bios->flags & KVM_MEM_READONLY)
		return bios->hva - bios->gpa != low->hva - low->gpa;
	return bios->gpa + bios->size > MIB(1);
}

/* UEFI needs flash memory of more than 1 MiB. SeaBIOS has 256 KiB. */
bool pf_firmware_is_uefi(void)
{
	static bool uefi;
	const struct memslot *flash = pf_memslot_at_gpa(GIB(4) - 4096);

	uefi |= flash && flash->flags & KVM_MEM_READONLY && flash->size > MIB(1);
	return uefi;
}

/*
 * Return whether SeaBIOS has made 0xf0000 RAM, but has not yet copied itself there
 * (src/fw/shadow.c). QEMU's reset does not reset PAM, so a reset in this state makes the guest
 * execute zeros and hang. Do not delay the vCPU in this state.
 */
bool pf_firmware_copies_itself(void)
{
	const struct memslot *bios = pf_memslot_at_gpa(RESET_VECTOR);
	uint64_t hva;

	if (!bios || bios->flags & KVM_MEM_READONLY ||
	    prefault_now_ns() > pf_slot_changed_at + QUIET_NS)
		return false;
	hva = bios->hva + RESET_VECTOR - bios->gpa;
	return pf_ranges_present(hva & ~4095ull, 4096) != 4096 || !*(const volatile uint8_t *)hva;
}
