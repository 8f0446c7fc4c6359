// SPDX-License-Identifier: GPL-2.0-or-later
#include "quirk.h"

#include <linux/kvm.h>

#include "event_log.h"
#include "messages.h"
#include "options.h"
#include "state.h"

/* Defined here because the installed kernel headers may predate Linux 6.12. */
#define CAP_DISABLE_QUIRKS2 213
#define QUIRK_SLOT_ZAP_ALL (1u << 7) /* Linux 6.12 */

static bool vfio_seen;

void pf_quirk_decide(void)
{
	struct kvm_enable_cap cap = { .cap = CAP_DISABLE_QUIRKS2, .args = { QUIRK_SLOT_ZAP_ALL } };
	long known = pf_raw_ioctl(pf_vm_fd, KVM_CHECK_EXTENSION, (void *)CAP_DISABLE_QUIRKS2);

	if (known < 0 || !(known & QUIRK_SLOT_ZAP_ALL))
		pf_quirk = QUIRK_ABSENT;
	else if (vfio_seen)
		pf_quirk = QUIRK_VFIO;
	else if (!pf_options.quirk_disable || pf_raw_ioctl(pf_vm_fd, KVM_ENABLE_CAP, &cap))
		pf_quirk = QUIRK_KEPT;
	else
		pf_quirk = QUIRK_DISABLED;
	pf_log_event("quirk", pf_quirk_names[pf_quirk], ",\"name\":\"KVM_X86_QUIRK_SLOT_ZAP_ALL\"");
}

void pf_quirk_vfio_seen(void)
{
	pthread_mutex_lock(&pf_lock);
	vfio_seen = true;
	if (pf_quirk == QUIRK_DISABLED)
		pf_print_error("qemu-prefault: a VFIO device was added after "
			       "KVM_X86_QUIRK_SLOT_ZAP_ALL was disabled, and the plugin cannot "
			       "enable it again. Use the quirk=keep option for this guest\n");
	pthread_mutex_unlock(&pf_lock);
}
