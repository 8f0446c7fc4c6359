// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Small KVM guests that detect the errors of Bochs that patches/bochs fixes. Each command fails
 * with a Bochs that lacks its patch:
 *
 * vmx_guest busy      a guest that runs a loop with IF=0 is interrupted by a signal
 * vmx_guest irqchip   a guest with an in-kernel APIC starts (needs APICv)
 * vmx_guest masked    an interrupt stays pending while IF=0 (needs APICv)
 * vmx_guest faulting  an interrupt whose delivery causes an EPT violation is delivered again
 *                     (needs APICv)
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#define MEMORY_BYTES 0x10000
#define CODE 0x1000
#define HANDLER 0x2000
#define FLAG 0x3000
#define VECTOR 0x40
#define BREAKPOINT 3
#define PORT 0x10
#define APIC_SVR 0xf0
#define APIC_ENABLED 0x1ff

static int vm, vcpu;
static struct kvm_run *run;
static uint8_t *memory;

static void must(int ok, const char *what)
{
	if (ok)
		return;
	printf("%s: %s\n", what, strerror(errno));
	exit(1);
}

static void on_signal(int number)
{
	(void)number;
}

static void create(int irqchip, const uint8_t *code, size_t length)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	must(kvm >= 0, "/dev/kvm");
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	must(vm >= 0, "KVM_CREATE_VM");
	must(!ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000), "KVM_SET_TSS_ADDR");
	if (irqchip)
		must(!ioctl(vm, KVM_CREATE_IRQCHIP), "KVM_CREATE_IRQCHIP");
	memory =
		mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	must(memory != MAP_FAILED, "mmap");
	memcpy(memory + CODE, code, length);
	struct kvm_userspace_memory_region slot = { .memory_size = MEMORY_BYTES,
						    .userspace_addr = (uintptr_t)memory };
	must(!ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	must(vcpu >= 0, "KVM_CREATE_VCPU");
	int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	must(run != MAP_FAILED, "mmap of kvm_run");
	struct kvm_sregs sregs;
	must(!ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	must(!ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	struct kvm_regs regs = { .rip = CODE, .rsp = 0x8000, .rflags = 2 };
	must(!ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static int busy(void)
{
	static const uint8_t code[] = { 0xeb, 0xfe }; /* jmp . */
	create(0, code, sizeof(code));
	struct itimerval timer = { .it_value = { .tv_usec = 200000 } };
	struct sigaction action = { .sa_handler = on_signal };
	must(!sigaction(SIGALRM, &action, NULL), "sigaction");
	must(!setitimer(ITIMER_REAL, &timer, NULL), "setitimer");
	int interrupted = ioctl(vcpu, KVM_RUN, NULL) == -1 && errno == EINTR;
	printf("interrupted %d\n", interrupted);
	return !interrupted;
}

/* Run until the guest writes to the port, and return the value. */
static int output(int port)
{
	must(!ioctl(vcpu, KVM_RUN, NULL), "KVM_RUN");
	if (run->exit_reason != KVM_EXIT_IO || run->io.port != port) {
		struct kvm_regs regs;
		ioctl(vcpu, KVM_GET_REGS, &regs);
		printf("exit reason %u (port %#x), and not output to port %#x: rip %#llx rsp %#llx "
		       "rflags %#llx rax %#llx flag %u\n",
		       run->exit_reason, run->io.port, port, regs.rip, regs.rsp, regs.rflags,
		       regs.rax, memory[FLAG]);
		exit(1);
	}
	return *((uint8_t *)run + run->io.data_offset);
}

static int irqchip(void)
{
	static const uint8_t code[] = { 0xb0, 0x2a, 0xe6, PORT }; /* mov $42, %al; out */
	create(1, code, sizeof(code));
	int value = output(PORT);
	printf("output %d\n", value);
	return value != 42;
}

static void set_handler(int vector, uint16_t address, const uint8_t *code, size_t length)
{
	memcpy(memory + address, code, length);
	memcpy(memory + vector * 4, &address, sizeof(address));
}

static void send_interrupt(void)
{
	struct kvm_lapic_state apic;
	must(!ioctl(vcpu, KVM_GET_LAPIC, &apic), "KVM_GET_LAPIC");
	uint32_t enabled = APIC_ENABLED;
	memcpy(apic.regs + APIC_SVR, &enabled, sizeof(enabled));
	must(!ioctl(vcpu, KVM_SET_LAPIC, &apic), "KVM_SET_LAPIC");
	struct kvm_msi msi = { .address_lo = 0xfee00000, .data = VECTOR };
	must(ioctl(vm, KVM_SIGNAL_MSI, &msi) > 0, "KVM_SIGNAL_MSI");
}

static int masked(void)
{
	static const uint8_t code[] = { /* cli; mov $0x800000, %ecx */
					0xfa, 0x66, 0xb9, 0x00, 0x00, 0x80, 0x00,
					/* 1: dec %ecx; jnz 1b */
					0x66, 0x49, 0x75, 0xfc,
					/* mov FLAG, %al; out */
					0xa0, 0x00, 0x30, 0xe6, PORT
	};
	static const uint8_t handler[] = { 0xc6, 0x06, 0x00, 0x30, 0x01, 0xcf }; /* FLAG = 1; iret */
	create(1, code, sizeof(code));
	set_handler(VECTOR, HANDLER, handler, sizeof(handler));
	send_interrupt();

	int delivered = output(PORT);
	printf("delivered with IF=0: %d\n", delivered);
	return delivered;
}

static int faulting(void)
{
	static const uint8_t code[] = { /* int3; mov $0xa000, %sp: a page without an EPT entry */
					0xcc, 0xbc, 0x00, 0xa0,
					/* sti; mov $0x800000, %ecx */
					0xfb, 0x66, 0xb9, 0x00, 0x00, 0x80, 0x00,
					/* 1: dec %ecx; jnz 1b */
					0x66, 0x49, 0x75, 0xfc,
					/* mov FLAG, %ax; out; mov %ah, %al; out */
					0xa1, 0x00, 0x30, 0xe6, PORT, 0x88, 0xe0, 0xe6, PORT
	};
	static const uint8_t on_interrupt[] = { 0xfe, 0x06, 0x00, 0x30, 0xcf }; /* FLAG++; iret */
	static const uint8_t on_breakpoint[] = { 0xfe, 0x06, 0x01, 0x30, 0xcf };
	create(1, code, sizeof(code));
	set_handler(VECTOR, HANDLER, on_interrupt, sizeof(on_interrupt));
	set_handler(BREAKPOINT, HANDLER + 0x10, on_breakpoint, sizeof(on_breakpoint));
	send_interrupt();

	int interrupts = output(PORT), breakpoints = output(PORT);
	printf("interrupts: %d, breakpoints: %d\n", interrupts, breakpoints);
	return interrupts != 1 || breakpoints != 1;
}

int main(int argc, char **argv)
{
	const char *command = argc == 2 ? argv[1] : "";
	if (!strcmp(command, "busy"))
		return busy();
	if (!strcmp(command, "faulting"))
		return faulting();
	if (!strcmp(command, "irqchip"))
		return irqchip();
	if (!strcmp(command, "masked"))
		return masked();
	fprintf(stderr, "usage: vmx_guest busy|irqchip|masked|faulting\n");
	return 2;
}
