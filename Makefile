# SPDX-License-Identifier: GPL-2.0-or-later
# Every target runs on a fresh Debian 12 with make and gcc. scripts/with-env installs missing
# packages with apt (as root, or with sudo) and Python packages into a virtual environment in the
# cache. The script does not write to the checkout or download what the cache already contains.

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

BUILD = gcc libc6-dev binutils python3-venv python3-dev
LAB   = mmdebstrap e2fsprogs util-linux $(if $(filter-out 0,$(shell id -u)),uidmap)
# The name of the mimalloc package contains a version.
HOST  = mount qemu-system-x86 patchelf libjemalloc2 libtcmalloc-minimal4 \
	$(shell apt-cache pkgnames libmimalloc 2>/dev/null | grep -m1 '^libmimalloc[0-9.]*$$')
# Needed only if this host's KVM can prefault. The tests then run on this host, not in the lab.
GUEST = qemu-utils ovmf
VT    = tcpdump netcat-openbsd iputils-arping xz-utils
# Needed only to build Bochs, which emulates an Intel CPU.
BOCHS = g++ make patch
QEMU  = ccache dpkg-dev libfdt-dev libglib2.0-dev libseccomp-dev ninja-build patch perl pkgconf \
	qemu-system-data seabios xz-utils zlib1g-dev

demo:      ## show the effect on a restored and a booting guest; DEMO_ARGS=--ept: on Intel's EPT
	@scripts/with-env "$(BUILD) $(LAB) $(if $(findstring --ept,$(DEMO_ARGS)),$(BOCHS))" qemu-prefault demo $(DEMO_ARGS)

unit:      ## run the unit tests only (a minute)
	@scripts/with-env "$(BUILD)" python tests/run.py unit

test:      ## run linters, unit tests, tests with QEMU, and tests in the nested lab
	@scripts/with-env "$(BUILD) $(LAB) $(HOST) $(BOCHS)" python tests/run.py

test-full: ## run everything on every kernel, with 1,000 kills and 30 boots (hours)
	@scripts/with-env "$(BUILD) $(LAB) $(HOST) $(GUEST) $(VT) $(BOCHS)" python tests/run.py --full

bench:     ## measure, write docs/benchmarks.md and its picture; BENCH_ARGS="PART…" selects parts
	@scripts/with-env "$(BUILD) $(LAB) $(HOST) $(QEMU)" python tests/bench/run.py $(BENCH_ARGS)

conformance: ## write docs/conformance.md: run the suite on each kernel, on NPT and EPT (40 minutes)
	@scripts/with-env "$(BUILD) $(LAB) $(BOCHS)" python scripts/make-conformance.py

qemu:      ## build the patched QEMU (patches/) and print its path (20 minutes, once)
	@scripts/with-env "$(BUILD) $(QEMU)" python -m qemu_prefault_lab qemu $(QEMU_ARGS)

avocado:   ## test distributions as guests; AVOCADO_ARGS="--distro sid …"
	@scripts/with-env "$(BUILD) $(LAB) $(HOST) $(GUEST) $(if $(findstring ovmf,$(AVOCADO_ARGS)),$(QEMU))" \
		python avocado/run.py distro $(AVOCADO_ARGS)

avocado-vt: ## run the avocado-vt tests; TP_QEMU=DIR adds those of a tp-qemu checkout
	@scripts/with-env "$(BUILD) $(LAB) $(HOST) $(GUEST) $(VT)" python avocado/run.py vt \
		$(if $(TP_QEMU),--tp-qemu "$(TP_QEMU)") $(AVOCADO_ARGS)

lint:      ## run ruff, mypy, import-linter, clang-format, bandit, two C analyzers; check .github/
	@scripts/with-env "$(BUILD)" python tests/run.py lint

docs:      ## build the documentation site, with warnings as errors; print its path
	@scripts/with-env "$(BUILD)" python scripts/make-docs.py html

man:       ## write man/*.1 from docs/reference/commands and the help texts
	@scripts/with-env "$(BUILD)" python scripts/make-docs.py man

clean:     ## remove build products from the checkout
	rm -rf build dist *.egg-info lab/build lab/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f qemu_prefault/native/helper_blob.h qemu_prefault/*.so qemu_prefault/*.o
	find . -name __pycache__ -prune -exec rm -rf {} +

clean-cache: ## remove the images and virtual environments from the cache
	directory=$$(python3 -I lab/qemu_prefault_lab/cache_directory.py path) && rm -rf "$$directory"

help:      ## list the targets
	@sed -n 's/^\([a-z-]*\): *## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

.PHONY: demo unit test test-full bench conformance qemu avocado avocado-vt lint docs man clean clean-cache help
