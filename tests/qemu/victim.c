// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A program whose threads check that their state does not change and that no signal is lost. The
 * state consists of all registers, the red zone, flags, x87 and SSE control words, errno, the
 * signal mask and the alternate stack. If the CPU has AMX, two threads also check a tile, and
 * another thread has used a tile but has released it.
 *
 * The program prints its thread ids, runs until the end of stdin, and prints the result.
 * test_inject_victim.py builds it and injects system calls into its threads.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define GPRS 13
#define RED_ZONE_WORDS 16
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18
#define TILE_ROWS 16
#define TILE_COLUMNS 64 /* bytes */

enum mode { COMPUTE, NANOSLEEP, FUTEX_TIMED, FUTEX_UNTIMED, PIPE_READ, MODES };

static const char *const mode_names[MODES] = { "compute", "nanosleep", "futex, timed",
					       "futex, untimed", "read" };

struct state {
	uint8_t ymm[16][32];
	uint64_t gpr[GPRS]; /* rbx rdi rsi rdx r8 r9 r10 r12 r13 r14 r15 rbp, and rax: result */
	uint64_t red_zone[RED_ZONE_WORDS];
	uint32_t mxcsr;
	uint16_t fpu_control;
	uint64_t flags;
};

struct thread {
	enum mode mode;
	pthread_t handle;
	volatile pid_t tid;
	volatile uint64_t iterations, signals;
	uint32_t futex;
	int pipe[2];
};

static struct thread threads[MODES];
static volatile int stopping;
static int has_avx, has_amx;

/*
 * Load all registers from *in, make the system call (or count down from 20000 if number is
 * negative), and store all registers in *out. The function is written in assembly, because compiled
 * code would use some of the registers.
 */
void run_with_state(const struct state *in, struct state *out, long number, long avx);
__asm__(".globl run_with_state\n"
	"run_with_state:\n"
	"	push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
	"	push %rsi; push %rdx; push %rcx\n" /* out, number, avx */
	"	ldmxcsr 744(%rdi)\n"
	"	fldcw 748(%rdi)\n"
	"	test %rcx, %rcx; jz 1f\n"
	".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
	"	vmovdqu 32*\\n(%rdi), %ymm\\n\n"
	".endr\n"
	"	jmp 2f\n"
	"1:\n"
	".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
	"	movdqu 32*\\n(%rdi), %xmm\\n\n"
	".endr\n"
	"2:\n"
	".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
	"	mov 616+8*\\n(%rdi), %rax; mov %rax, -8-8*\\n(%rsp)\n"
	".endr\n"
	"	mov 8(%rsp), %rax\n" /* number */
	"	mov 512(%rdi), %rbx; mov 528(%rdi), %rsi; mov 536(%rdi), %rdx\n"
	"	mov 544(%rdi), %r8; mov 552(%rdi), %r9; mov 560(%rdi), %r10\n"
	"	mov 568(%rdi), %r12; mov 576(%rdi), %r13; mov 584(%rdi), %r14\n"
	"	mov 592(%rdi), %r15; mov 600(%rdi), %rbp; mov 520(%rdi), %rdi\n"
	"	test %rax, %rax; js 3f\n"
	"	stc\n" /* a system call preserves the flags in r11, so carry must be unchanged */
	"	syscall\n"
	"	jmp 5f\n"
	"3:	mov $20000, %ecx\n"
	"	mov $0x1122334455667788, %rax\n"
	"	mov %rax, %r11\n"
	"	stc\n"
	"4:	dec %ecx; jnz 4b\n"
	"	jnc 10f\n"
	"	jrcxz 6f\n"
	"10:"
	"	ud2\n"
	"6:	cmp %rax, %r11; je 7f\n"
	"	ud2\n"
	"7:	stc\n"
	"5:	xchg %rcx, 16(%rsp)\n" /* out; a system call does not preserve rcx */
	"	mov %rax, 608(%rcx); mov %rbx, 512(%rcx); mov %rdi, 520(%rcx); mov %rsi, 528(%rcx)\n"
	"	mov %rdx, 536(%rcx); mov %r8, 544(%rcx); mov %r9, 552(%rcx); mov %r10, 560(%rcx)\n"
	"	mov %r12, 568(%rcx); mov %r13, 576(%rcx); mov %r14, 584(%rcx); mov %r15, 592(%rcx)\n"
	"	mov %rbp, 600(%rcx)\n"
	".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
	"	mov -8-8*\\n(%rsp), %rax; mov %rax, 616+8*\\n(%rcx)\n"
	".endr\n"
	"	pushf; pop %rax; mov %rax, 752(%rcx)\n"
	"	stmxcsr 744(%rcx)\n"
	"	fnstcw 748(%rcx)\n"
	"	mov (%rsp), %rax; test %rax, %rax; jz 8f\n"
	".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
	"	vmovdqu %ymm\\n, 32*\\n(%rcx)\n"
	".endr\n"
	"	vzeroupper\n"
	"	jmp 9f\n"
	"8:\n"
	".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
	"	movdqu %xmm\\n, 32*\\n(%rcx)\n"
	".endr\n"
	"9:	add $24, %rsp\n"
	"	pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\n"
	"	ret\n");

_Static_assert(__builtin_offsetof(struct state, gpr) == 512, "the assembly uses this offset");
_Static_assert(__builtin_offsetof(struct state, red_zone) == 616, "the assembly uses this offset");
_Static_assert(__builtin_offsetof(struct state, mxcsr) == 744, "the assembly uses this offset");
_Static_assert(__builtin_offsetof(struct state, fpu_control) == 748,
	       "the assembly uses this offset");
_Static_assert(__builtin_offsetof(struct state, flags) == 752, "the assembly uses this offset");

static void die(const struct thread *thread, const char *what, uint64_t was, uint64_t is)
{
	printf("CHANGED in \"%s\", iteration %lu: %s was %#lx, is %#lx\n", mode_names[thread->mode],
	       thread->iterations, what, was, is);
	fflush(stdout);
	_exit(1);
}

static int keeps_tile(const struct thread *thread)
{
	return has_amx && (thread->mode == COMPUTE || thread->mode == FUTEX_TIMED);
}

static void use_tile(const struct thread *thread, const uint8_t tile[TILE_ROWS * TILE_COLUMNS])
{
	struct {
		uint8_t palette, start_row, reserved[14];
		uint16_t columns[16];
		uint8_t rows[16];
	} config = { .palette = 1, .columns = { TILE_COLUMNS }, .rows = { TILE_ROWS } };

	if (keeps_tile(thread) || (has_amx && thread->mode == PIPE_READ))
		__asm__ volatile("ldtilecfg %0\n"
				 "tileloadd (%1,%2,1), %%tmm0\n" ::"m"(config),
				 "r"(tile), "r"((long)TILE_COLUMNS)
				 : "memory");
	if (has_amx && thread->mode == PIPE_READ)
		__asm__ volatile("tilerelease");
}

static void check_tile(const struct thread *thread, const uint8_t tile[TILE_ROWS * TILE_COLUMNS])
{
	uint8_t now[TILE_ROWS * TILE_COLUMNS];

	if (!keeps_tile(thread))
		return;
	__asm__ volatile("tilestored %%tmm0, (%0,%1,1)\n" ::"r"(now), "r"((long)TILE_COLUMNS)
			 : "memory");
	if (memcmp(tile, now, sizeof(now)))
		die(thread, "a tile", tile[0], now[0]);
}

static void check_result(const struct thread *thread, long result)
{
	switch (thread->mode) {
	case NANOSLEEP:
		/*
		 * rt_sigreturn sets the restart function do_no_restart_syscall(), so a relative
		 * sleep returns EINTR. Any signal handler has this effect.
		 */
		if (result != 0 && result != -EINTR)
			die(thread, "result", 0, (uint64_t)result);
		break;
	case FUTEX_TIMED:
		if (result != -ETIMEDOUT && result != -EINTR)
			die(thread, "result", (uint64_t)-ETIMEDOUT, (uint64_t)result);
		break;
	case FUTEX_UNTIMED:
		if (result != 0 && result != -EAGAIN && result != -EINTR)
			die(thread, "result", 0, (uint64_t)result);
		break;
	case PIPE_READ:
		if (result != 1)
			die(thread, "result", 1, (uint64_t)result);
		break;
	default:
		break;
	}
}

static void compare(const struct thread *thread, const struct state *in, const struct state *out)
{
	static const char *const names[] = { "rbx", "rdi", "rsi", "rdx", "r8",	"r9",
					     "r10", "r12", "r13", "r14", "r15", "rbp" };

	for (size_t i = 0; i < GPRS - 1; i++)
		if (in->gpr[i] != out->gpr[i])
			die(thread, names[i], in->gpr[i], out->gpr[i]);
	for (size_t i = 0; i < RED_ZONE_WORDS; i++)
		if (in->red_zone[i] != out->red_zone[i])
			die(thread, "red zone", in->red_zone[i], out->red_zone[i]);
	for (size_t i = 0; i < 16; i++)
		if (memcmp(in->ymm[i], out->ymm[i], has_avx ? 32 : 16))
			die(thread, "a vector register", i, i);
	if (in->mxcsr != out->mxcsr)
		die(thread, "mxcsr", in->mxcsr, out->mxcsr);
	if (in->fpu_control != out->fpu_control)
		die(thread, "x87 control word", in->fpu_control, out->fpu_control);
	if (!(out->flags & 1))
		die(thread, "carry flag", 1, 0);
}

static void on_signal(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	threads[info->si_value.sival_int].signals++;
}

static void *main_of_thread(void *argument)
{
	struct thread *thread = argument;
	static const long calls[MODES] = { -1, SYS_nanosleep, SYS_futex, SYS_futex, SYS_read };
	struct timespec pause = { 0, 200000 };
	char *stack = malloc(SIGSTKSZ), byte;
	stack_t mine = { .ss_sp = stack, .ss_size = SIGSTKSZ }, found;
	sigset_t mask, now;
	struct state in, out;
	unsigned int seed = (unsigned int)thread->mode + 1;
	uint8_t tile[TILE_ROWS * TILE_COLUMNS];

	sigaltstack(&mine, NULL);
	sigemptyset(&mask);
	sigaddset(&mask, SIGUSR2);
	sigaddset(&mask, SIGRTMIN + 3 + (int)thread->mode);
	pthread_sigmask(SIG_SETMASK, &mask, NULL);
	memset(tile, 0x5a + (int)thread->mode, sizeof(tile));
	use_tile(thread, tile);
	errno = 1000 + (int)thread->mode;
	thread->tid = (pid_t)syscall(SYS_gettid);
	while (!stopping) {
		uint8_t *bytes = (uint8_t *)&in;

		for (size_t i = 0; i < sizeof(in); i++)
			bytes[i] = (uint8_t)rand_r(&seed);
		in.mxcsr = 0x1f80 | (thread->iterations % 4) << 13; /* rounding modes */
		in.fpu_control = (uint16_t)(0x37f & ~(thread->iterations % 2 << 8));
		if (thread->mode == NANOSLEEP) {
			in.gpr[1] = (uint64_t)&pause;
			in.gpr[2] = 0;
		} else if (thread->mode == FUTEX_TIMED || thread->mode == FUTEX_UNTIMED) {
			in.gpr[1] = (uint64_t)&thread->futex;
			in.gpr[2] = FUTEX_WAIT | FUTEX_PRIVATE_FLAG;
			in.gpr[3] = thread->futex;
			in.gpr[6] = thread->mode == FUTEX_TIMED ? (uint64_t)&pause : 0;
		} else if (thread->mode == PIPE_READ) {
			in.gpr[1] = (uint64_t)thread->pipe[0];
			in.gpr[2] = (uint64_t)&byte;
			in.gpr[3] = 1;
		}
		run_with_state(&in, &out, calls[thread->mode], has_avx);
		if (stopping)
			break;
		compare(thread, &in, &out);
		check_tile(thread, tile);
		check_result(thread, (long)out.gpr[GPRS - 1]);
		if (errno != 1000 + (int)thread->mode)
			die(thread, "errno", 1000 + (uint64_t)thread->mode, (uint64_t)errno);
		pthread_sigmask(SIG_SETMASK, NULL, &now);
		for (int number = 1; number < 65; number++)
			if (sigismember(&now, number) != sigismember(&mask, number))
				die(thread, "signal mask of", (uint64_t)number, 0);
		sigaltstack(NULL, &found);
		if (found.ss_sp != mine.ss_sp || found.ss_size != mine.ss_size ||
		    found.ss_flags != mine.ss_flags)
			die(thread, "alternate stack", (uint64_t)mine.ss_sp, (uint64_t)found.ss_sp);
		thread->iterations++;
	}
	return NULL;
}

int main(void)
{
	struct sigaction action = { .sa_sigaction = on_signal,
				    .sa_flags = SA_SIGINFO | SA_RESTART };
	struct timespec pause = { 0, 1000000 };
	uint64_t sent = 0;

	has_amx = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
	has_avx = __builtin_cpu_supports("avx") != 0;
	setvbuf(stdout, NULL, _IONBF, 0);
	sigaction(SIGRTMIN + 1, &action, NULL);
	for (int i = 0; i < MODES; i++) {
		threads[i].mode = (enum mode)i;
		if (pipe(threads[i].pipe) ||
		    pthread_create(&threads[i].handle, NULL, main_of_thread, &threads[i]))
			return 2;
	}
	for (int i = 0; i < MODES; i++) {
		while (!threads[i].tid)
			nanosleep(&pause, NULL);
		printf("%d ", threads[i].tid);
	}
	printf("\n");
	for (struct timeval none;;) {
		fd_set input;

		FD_ZERO(&input);
		FD_SET(0, &input);
		none = (struct timeval){ 0, 500 };
		if (select(1, &input, NULL, NULL, &none) > 0)
			break;
		__atomic_add_fetch(&threads[FUTEX_UNTIMED].futex, 1, __ATOMIC_SEQ_CST);
		syscall(SYS_futex, &threads[FUTEX_UNTIMED].futex, FUTEX_WAKE | FUTEX_PRIVATE_FLAG,
			1, NULL, NULL, 0);
		if (write(threads[PIPE_READ].pipe[1], "x", 1) != 1)
			return 2;
		/* Also queue a signal, which must be delivered exactly once. */
		if (sent < 2000) {
			for (int i = 0; i < MODES; i++) {
				union sigval which = { .sival_int = i };

				while (pthread_sigqueue(threads[i].handle, SIGRTMIN + 1, which))
					nanosleep(&pause, NULL);
			}
			sent++;
		}
	}
	for (int i = 0; i < MODES; i++) /* wait until all signals have arrived */
		for (int tries = 0; threads[i].signals != sent && tries < 5000; tries++)
			nanosleep(&pause, NULL);
	for (int i = 0; i < MODES; i++)
		if (threads[i].signals != sent)
			die(&threads[i], "number of signals", sent, threads[i].signals);
	stopping = 1;
	threads[FUTEX_UNTIMED].futex++;
	syscall(SYS_futex, &threads[FUTEX_UNTIMED].futex, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1, NULL,
		NULL, 0);
	if (write(threads[PIPE_READ].pipe[1], "x", 1) != 1)
		return 2;
	for (int i = 0; i < MODES; i++)
		pthread_join(threads[i].handle, NULL);
	printf("unchanged");
	for (int i = 0; i < MODES; i++)
		printf(" %lu", threads[i].iterations);
	printf(" signals %lu\n", sent);
	return 0;
}
