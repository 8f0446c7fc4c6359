// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "got.h"

#include <elf.h>
#include <link.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

struct request {
	const struct got_entry *entries;
	size_t count;
	unsigned int redirected;
};

/* Replace one entry of the program's global offset table. */
static bool redirect(uint64_t *entry, void *function)
{
	uint64_t page = (uint64_t)entry & ~4095ull;
	uint64_t value = (uint64_t)function;

	/* With RELRO the table is read-only. redirect_program() makes it read-only again. */
	if (mprotect((void *)page, 4096, PROT_READ | PROT_WRITE))
		return false;
	__atomic_store_n(entry, value, __ATOMIC_RELEASE);
	return true;
}

struct tables {
	const Elf64_Sym *symbols;
	const char *names;
	const Elf64_Rela *relocations[2]; /* data, calls */
	size_t sizes[2];
};

static int redirect_program(struct dl_phdr_info *program, size_t size, void *context)
{
	struct request *request = context;
	struct tables tables = { 0 };
	uint64_t relro = 0, relro_end = 0;

	(void)size;
	for (int i = 0; i < program->dlpi_phnum; i++) {
		const Elf64_Phdr *header = &program->dlpi_phdr[i];
		const Elf64_Dyn *dynamic = (void *)(program->dlpi_addr + header->p_vaddr);

		if (header->p_type == PT_GNU_RELRO) {
			relro = (program->dlpi_addr + header->p_vaddr) & ~4095ull;
			relro_end = (program->dlpi_addr + header->p_vaddr + header->p_memsz) &
				    ~4095ull;
		}
		if (header->p_type != PT_DYNAMIC)
			continue;
		for (; dynamic->d_tag != DT_NULL; dynamic++) {
			void *address = (void *)dynamic->d_un.d_ptr;

			switch (dynamic->d_tag) {
			case DT_SYMTAB:
				tables.symbols = address;
				break;
			case DT_STRTAB:
				tables.names = address;
				break;
			case DT_RELA:
				tables.relocations[0] = address;
				break;
			case DT_RELASZ:
				tables.sizes[0] = dynamic->d_un.d_val;
				break;
			case DT_JMPREL:
				tables.relocations[1] = address;
				break;
			case DT_PLTRELSZ:
				tables.sizes[1] = dynamic->d_un.d_val;
				break;
			}
		}
	}
	for (int which = 0; tables.symbols && tables.names && which < 2; which++)
		for (size_t i = 0; i < tables.sizes[which] / sizeof(Elf64_Rela); i++) {
			const Elf64_Rela *rela = &tables.relocations[which][i];
			uint64_t type = ELF64_R_TYPE(rela->r_info);
			const Elf64_Sym *symbol = &tables.symbols[ELF64_R_SYM(rela->r_info)];

			if (type != R_X86_64_GLOB_DAT && type != R_X86_64_JUMP_SLOT)
				continue;
			for (size_t entry = 0; entry < request->count; entry++)
				if (!strcmp(tables.names + symbol->st_name,
					    request->entries[entry].name))
					request->redirected |=
						redirect((void *)(program->dlpi_addr +
								  rela->r_offset),
							 request->entries[entry].function)
						<< entry;
		}
	if (relro)
		mprotect((void *)relro, relro_end - relro, PROT_READ);
	return 1; /* end the iteration: the first object is the program itself */
}

unsigned int pf_got_redirect(const struct got_entry *entries, size_t count)
{
	struct request request = { .entries = entries, .count = count };

	dl_iterate_phdr(redirect_program, &request);
	return request.redirected;
}
