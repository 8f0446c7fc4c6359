# SPDX-License-Identifier: GPL-2.0-or-later
# A fresh Debian 12 with make and gcc is enough: what is missing is installed with apt (as
# root, or by sudo), Python packages go into a virtual environment in the cache, and no file
# is written into the checkout. Run again without a change, nothing is downloaded.

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

BUILD = gcc libc6-dev binutils python3-venv python3-dev
LAB   = mmdebstrap e2fsprogs util-linux $(if $(filter-out 0,$(shell id -u)),uidmap)
# The last: libmimalloc2.0 in Debian 12; the name has changed since.
HOST  = qemu-system-x86 libjemalloc2 libtcmalloc-minimal4 \
	$(shell apt-cache pkgnames libmimalloc 2>/dev/null | grep -m1 '^libmimalloc[0-9.]*$$')
# Where this host's own KVM can prefault, what is tested runs on it and not in the lab.
GUEST = qemu-utils ovmf
VT    = tcpdump netcat-openbsd iputils-arping xz-utils
QEMU  = ccache dpkg-dev libfdt-dev libglib2.0-dev libseccomp-dev ninja-build patch perl pkgconf \
	qemu-system-data seabios xz-utils zlib1g-dev

demo:      ## a restored and a booting guest, resumed three ways (no virtualization needed)
	@scripts/with-env "$(BUILD) $(LAB)" qemu-prefault demo $(DEMO_ARGS)

test:      ## linters, unit tests, real QEMUs, and the real ioctl in the nested lab
	@scripts/with-env "$(BUILD) $(LAB) $(HOST)" python tests/run.py

test-full: ## test, but everything on every kernel, 1,000 kills and 30 boots (hours)
	@scripts/with-env "$(BUILD) $(LAB) $(HOST) $(GUEST) $(VT)" python tests/run.py --full

bench:     ## the measurements of docs/benchmarks.md; BENCH_ARGS="PART..." for some of them
	@scripts/with-env "$(BUILD) $(LAB) $(HOST) $(QEMU)" python tests/bench/run.py $(BENCH_ARGS)

conformance: ## docs/conformance.md anew: the suite on three kernels, in three modes each
	@scripts/with-env "$(BUILD) $(LAB)" python scripts/make-conformance.py

qemu:      ## the patched QEMU (patches/); prints where it is (20 minutes, once)
	@scripts/with-env "$(BUILD) $(QEMU)" python -m qemu_prefault_lab qemu $(QEMU_ARGS)

avocado:   ## whole distributions as guests, under avocado; AVOCADO_ARGS="--distro sid …"
	@scripts/with-env "$(BUILD) $(LAB) $(HOST) $(GUEST) $(if $(findstring ovmf,$(AVOCADO_ARGS)),$(QEMU))" \
		python avocado/run.py distro $(AVOCADO_ARGS)

avocado-vt: ## the avocado-vt provider, and avocado-vt's own tests if TP_QEMU names a checkout
	@scripts/with-env "$(BUILD) $(LAB) $(HOST) $(GUEST) $(VT)" python avocado/run.py vt \
		$(if $(TP_QEMU),--tp-qemu "$(TP_QEMU)") $(AVOCADO_ARGS)

lint:      ## ruff, mypy, import-linter and clang-format
	@scripts/with-env "$(BUILD)" python tests/run.py lint

man:       ## write man/qemu-prefault.1 anew from the --help texts
	@scripts/with-env "$(BUILD)" python scripts/make-man.py

clean:     ## remove build products from the checkout
	rm -rf build dist *.egg-info lab/build lab/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f qemu_prefault/native/helper_blob.h qemu_prefault/*.so qemu_prefault/*.o
	find . -name __pycache__ -prune -exec rm -rf {} +

clean-cache: ## remove the images and virtual environments from the cache
	rm -rf "$${QEMU_PREFAULT_CACHE:-$${XDG_CACHE_HOME:-$$HOME/.cache}/qemu-prefault}"

help:      ## this text
	@sed -n 's/^\([a-z-]*\): *## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

.PHONY: demo test test-full bench conformance qemu avocado avocado-vt lint man clean clean-cache help
