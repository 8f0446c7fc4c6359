// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A library for LD_PRELOAD. When SIGUSR2 arrives, it uses up the process's mappings
 * (vm.max_map_count), except for 4 or 5.
 */
#include <signal.h>
#include <stddef.h>
#include <sys/mman.h>

#define PAGE ((size_t)4096)
#define PAIRS ((size_t)1 << 20)
#define SPARE_PAIRS 2

static void use_up(int signal_number)
{
	char *area = mmap(NULL, 2 * PAIRS * PAGE, PROT_NONE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	size_t made = 0;

	(void)signal_number;
	if (area == MAP_FAILED)
		return;
	/* Each call splits a mapping twice. */
	while (made < PAIRS && !mprotect(area + (2 * made + 1) * PAGE, PAGE, PROT_READ))
		made++;
	for (int i = 0; i < SPARE_PAIRS && made; i++)
		mprotect(area + (2 * --made + 1) * PAGE, PAGE, PROT_NONE);
}

__attribute__((constructor)) static void initialize(void)
{
	signal(SIGUSR2, use_up);
}
