// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Convert the FPU state of a thread on a CPU with AMX, and print the size in the frame, the extended
 * size, and the offsets at which FP_XSTATE_MAGIC2 is. The argument is XSTATE_BV, the bit mask of
 * the features in use. test_native_xstate.py builds and runs this program.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/uio.h>

#include "ptrace/arch_x86_64.h"

#define REGSET_SIZE 11008

int main(int argc, char **argv)
{
	static unsigned char xstate[ARCH_XSTATE_MAX + ARCH_XSTATE_TAIL];
	/* CPUID leaf 0xd of Sapphire Rapids. arch/x86/kernel/fpu/xstate.c names the features. */
	static const struct xsave_feature features[XSAVE_FEATURES] = {
		[2] = { 576, 256, 0 },	  /* AVX */
		[5] = { 1088, 64, 0 },	  /* AVX-512 opmask */
		[6] = { 1152, 512, 0 },	  /* AVX-512 Hi256 */
		[7] = { 1664, 1024, 0 },  /* AVX-512 ZMM_Hi256 */
		[8] = { 0, 128, 0 },	  /* PT, a supervisor feature */
		[9] = { 2688, 8, 0 },	  /* PKRU */
		[17] = { 2752, 64, 0 },	  /* AMX tile configuration */
		[18] = { 2816, 8192, 1 }, /* AMX tile data */
	};
	uint64_t in_use = strtoull(argv[argc - 1], NULL, 0), possible = 0x602e7;
	struct fx_sw_bytes sw;
	uint32_t word;

	memcpy(xstate + XSAVE_HEADER, &in_use, sizeof(in_use));
	memcpy(xstate + FXSAVE_SW_RESERVED, &possible, sizeof(possible));
	arch_seal_xstate(xstate, REGSET_SIZE, features);
	memcpy(&sw, xstate + FXSAVE_SW_RESERVED, sizeof(sw));
	printf("%#x %u %u", sw.magic1, sw.xstate_size, sw.extended_size);
	for (size_t at = XSAVE_HEADER_END; at <= REGSET_SIZE; at += sizeof(word)) {
		memcpy(&word, xstate + at, sizeof(word));
		if (word == FP_XSTATE_MAGIC2)
			printf(" %zu", at);
	}
	printf("\n");
	return 0;
}
