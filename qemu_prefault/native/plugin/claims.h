// SPDX-License-Identifier: GPL-2.0-or-later
#ifndef QEMU_PREFAULT_PLUGIN_CLAIMS_H
#define QEMU_PREFAULT_PLUGIN_CLAIMS_H

/*
 * Check whether each source has enough memory for all pages that must still be populated. If a
 * source has too little memory, stop populating, and prefault only present pages. Call with pf_lock
 * held.
 */
void pf_claims_check(void);

/*
 * Repeat the check each time that the plugin has populated a sixteenth of the free memory. If
 * several guests start at the same time, each of them counts the same free memory. These checks
 * detect how fast other processes allocate this memory. A guest stops populating if the memory
 * would be exhausted.
 */
void pf_claims_check_again(void);

#endif
