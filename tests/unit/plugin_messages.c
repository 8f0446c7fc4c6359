// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Print lines to a stderr whose reader may have stopped. test_native_plugin_messages.py links this
 * file with the plugin's files.
 *
 * For each number in stdin, the program queues this many lines, and then prints the number of lost
 * lines to stdout. It exits at the end of stdin.
 */
#include <stdio.h>

#include "plugin/messages.h"
#include "plugin/state.h"
#include "plugin/watchdog.h"

int main(void)
{
	int number = 0, count;

	pf_watchdog_start();
	while (scanf("%d", &count) == 1) {
		pthread_mutex_lock(&pf_lock);
		for (int i = 0; i < count; i++)
			pf_print_error("line %d\n", number++);
		printf("%llu\n", (unsigned long long)pf_messages_lost());
		pthread_mutex_unlock(&pf_lock);
		fflush(stdout);
	}
	pf_messages_finish(); /* main.c does this when QEMU exits */
	return 0;
}
