# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of one run: options, preflight checks, plan, executor, tally and report."""
