# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of a run: options, preflight, plan, executor, tally and report."""
