// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A boot sector that measures the intervals in which its vCPU does not run. The local APIC's timer
 * interrupts the vCPU every millisecond. The guest does not use the PIT, because KVM delivers the
 * PIT's ticks from a kernel thread with ordinary priority (pit_do_work() in arch/x86/kvm/i8254.c),
 * which a vCPU with real-time priority would delay.
 *
 * In each period of 3 ms, the vCPU spins for as many milliseconds as the byte spin specifies, and
 * halts for the rest. The guest logs the time between two iterations of its loop if the time is at
 * least threshold. The log and threshold are in TSC cycles. The test sets spin and threshold, and
 * reads the log.
 */
	.code16
	.set	LOG, 0x8000	/* number of entries; at LOG + 8, the last TSC value */
	.set	ENTRIES, 0x8010	/* 8 bytes each */
	.set	LIMIT, 2000
	.set	VECTOR, 0x40

	.globl	_start
_start:
	jmp	begin
	.org	4
spin:	.byte	0
	.org	8
threshold:
	.long	0

begin:
	cli
	xor	%ax, %ax
	mov	%ax, %ds
	mov	%ax, %ss
	mov	$0x7c00, %sp
	movl	$0, LOG
	movw	$tick, VECTOR * 4
	movw	$0, VECTOR * 4 + 2
	mov	$0xff, %al	/* the PIC delivers no interrupts */
	out	%al, $0x21
	lgdtl	gdt
	mov	%cr0, %eax
	or	$1, %al
	mov	%eax, %cr0
	mov	$8, %bx
	mov	%bx, %fs	/* in real mode, fs keeps the limit of 4 GiB */
	and	$~1, %al
	mov	%eax, %cr0
	xor	%bx, %bx
	mov	%bx, %fs
	mov	$0xfee00000, %esi	/* the local APIC */
	movl	$0x1ff, %fs:0xf0(%esi)	/* enabled */
	movl	$(0x20000 | VECTOR), %fs:0x320(%esi)	/* periodic timer */
	movl	$0xb, %fs:0x3e0(%esi)	/* divide by 1. KVM's APIC bus runs at 1 GHz. */
	movl	$1000000, %fs:0x380(%esi)
	rdtsc
	mov	%eax, LOG + 8
	mov	%edx, LOG + 12
	sti
again:
	mov	phase, %al
	cmp	spin, %al
	jb	measure
	hlt
measure:
	rdtsc
	mov	%eax, %ebx
	mov	%edx, %ecx
	sub	LOG + 8, %eax
	sbb	LOG + 12, %edx
	mov	%ebx, LOG + 8
	mov	%ecx, LOG + 12
	test	%edx, %edx
	jnz	log
	cmp	threshold, %eax
	jb	again
log:
	mov	LOG, %ebx
	cmp	$LIMIT, %ebx
	jae	again
	mov	%eax, ENTRIES(, %ebx, 8)
	mov	%edx, ENTRIES + 4(, %ebx, 8)
	incl	LOG
	jmp	again

tick:
	push	%ax
	mov	phase, %al
	inc	%al
	cmp	$3, %al
	jb	1f
	xor	%al, %al
1:	mov	%al, phase
	movl	$0, %fs:0xb0(%esi)	/* end of interrupt */
	pop	%ax
	iret
phase:	.byte	0

	.balign	8
table:	.quad	0
	.quad	0x00cf92000000ffff	/* data, 4 GiB */
gdt:	.word	gdt - table - 1
	.long	table

	.org	510
	.word	0xaa55
