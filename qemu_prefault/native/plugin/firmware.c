// SPDX-License-Identifier: GPL-2.0-or-later
#include "firmware.h"

#include <linux/kvm.h>

#include "common/prefault_loop.h"
#include "host_ranges.h"
#include "state.h"

#define RESET_VECTOR 0xffff0 /* a jump, once the firmware is there */

/*
 * How far pc's and q35's firmware is with low RAM. It copies itself below 1 MiB, for which
 * QEMU deletes and re-creates the slot of low RAM three times (PAM, hw/pci-host/pam.c).
 *
 *   at reset    0xf0000 is the flash, read-only      more to come
 *   at work     it is RAM, one slot with what is above 1 MiB    more to come
 *   done        it is a read-only slot of RAM
 *
 * microvm maps its firmware there as memory, and changes nothing.
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

/*
 * SeaBIOS made 0xf0000 RAM, and is yet to copy itself there (src/fw/shadow.c). QEMU's reset
 * leaves PAM as it is: if it comes now, the guest starts among zeros and never gets further.
 * This moment is no time to linger.
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
