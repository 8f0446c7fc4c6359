// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_PLUGIN_CLAIMS_H
#define QEMU_PREFAULT_PLUGIN_CLAIMS_H

/*
 * Check whether each source has enough memory for all that is still to be populated. If one does
 * not, populate nothing more, and prefault only present pages. Call with pf_lock held.
 */
void pf_claims_check(void);

/*
 * Do the same during the work, each time that a sixteenth of the memory has been populated. Guests
 * that start at once see the same free memory. All of them stop when they together take too much,
 * and leave what they still wanted to each other.
 */
void pf_claims_check_again(void);

#endif
