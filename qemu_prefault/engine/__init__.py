# SPDX-License-Identifier: GPL-2.0-or-later
"""One run: options, checks, plan, execution, tally, report."""
