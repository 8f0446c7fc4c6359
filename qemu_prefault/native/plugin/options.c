// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "os.h"

#define VARIABLE "QEMU_PREFAULT_OPTIONS"

struct plugin_options pf_options = { .keep = true, .quirk_disable = true, .hold_ns = MS(1000) };

const char *const pf_populate_names[3] = { "auto", "all", "resident" };

static bool parse_switch(const char *value, bool *target, const char *on, const char *off)
{
	if (strcmp(value, on) && strcmp(value, off))
		return false;
	*target = !strcmp(value, on);
	return true;
}

/* Return the index of a value in a list of three names, or -1. */
static int parse_choice(const char *value, const char *const names[3])
{
	for (int i = 0; i < 3; i++)
		if (!strcmp(value, names[i]))
			return i;
	return -1;
}

static bool parse_populate(const char *value)
{
	int choice = parse_choice(value, pf_populate_names);

	if (choice >= 0)
		pf_options.populate = (enum populate)choice;
	return choice >= 0;
}

static bool parse_vcpu(const char *value)
{
	static const char *const names[3] = { "auto", "prefault", "borrow" };
	int choice = parse_choice(value, names);

	if (choice >= 0)
		pf_options.vcpu = (enum vcpu_choice)choice;
	return choice >= 0;
}

/* Accept a number of bytes per second with an optional suffix K, M or G. */
static bool parse_rate(const char *value)
{
	static const char suffixes[] = "KMG";
	char *end;
	unsigned long long number = strtoull(value, &end, 10);
	const char *suffix = *end ? strchr(suffixes, *end) : NULL;
	int shift = suffix ? 10 * (int)(suffix - suffixes + 1) : 0;

	if (value[0] < '0' || value[0] > '9' || (*end && (!suffix || end[1])) ||
	    number > (UINT64_MAX >> 1 >> shift))
		return false;
	pf_options.rate = (uint64_t)number << shift;
	return true;
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

/* Accept "~/PATH", because libvirt sets HOME to the directory in which QEMU may write. */
static bool parse_socket(const char *value)
{
	const char *home = "";

	pf_options.socket_off = !strcmp(value, "off");
	if (pf_options.socket_off)
		return true;
	if (!strncmp(value, "~/", 2)) {
		home = getenv("HOME");
		value++;
	}
	if (!home || value[0] != '/' || strlen(home) + strlen(value) >= sizeof(pf_options.socket))
		return false;
	stpcpy(stpcpy(pf_options.socket, home), value);
	return true;
}

bool pf_options_parse(const char *text)
{
	const char *value = strchr(text, '=');
	size_t length = value ? (size_t)(value - text) : 0;
	bool fine = false;

#define IS(key) (length == sizeof(key) - 1 && !strncmp(text, key, length))
	if (value) {
		value++;
		if (IS("keep"))
			fine = parse_switch(value, &pf_options.keep, "on", "off");
		else if (IS("log"))
			fine = parse_switch(value, &pf_options.log, "on", "off");
		else if (IS("quirk"))
			fine = parse_switch(value, &pf_options.quirk_disable, "disable", "keep");
		else if (IS("populate"))
			fine = parse_populate(value);
		else if (IS("hold"))
			fine = parse_seconds(value, &pf_options.hold_ns);
		else if (IS("vcpu"))
			fine = parse_vcpu(value);
		else if (IS("start"))
			fine = parse_switch(value, &pf_options.background, "background", "wait");
		else if (IS("rate"))
			fine = parse_rate(value);
		else if (IS("socket"))
			fine = parse_socket(value);
	}
#undef IS
	if (!fine)
		fprintf(stderr,
			"qemu-prefault: '%s' is not a valid option. The options are: keep=on|off, "
			"populate=auto|all|resident, vcpu=auto|prefault|borrow, "
			"start=wait|background, rate=BYTES_PER_SECOND, quirk=disable|keep, "
			"hold=SECONDS, socket=/PATH|~/PATH|off, log=on|off\n",
			text);
	return fine;
}

bool pf_options_parse_late(const char *text)
{
	const struct plugin_options before = pf_options;

	if (!pf_options_parse(text))
		return false;
	if (pf_options.vcpu == before.vcpu && pf_options.socket_off == before.socket_off &&
	    !strcmp(pf_options.socket, before.socket))
		return true;
	pf_options = before;
	fprintf(stderr,
		"qemu-prefault: the plugin was loaded before -plugin ...,%s, and the option no "
		"longer has an effect. Give all options at one place: either to qemu-prefault run "
		"-o, or to one -plugin option\n",
		text);
	return true;
}

void pf_options_take_environment(void)
{
	const char *text = getenv(VARIABLE);
	char *copy = text ? strdup(text) : NULL, *rest = copy, *word;

	while (copy && (word = strsep(&rest, ",")))
		if (*word)
			pf_options_parse(word);
	free(copy);
	unsetenv(VARIABLE);
}
