# SPDX-License-Identifier: GPL-2.0-or-later
"""The modules that check, plan and perform a run, and report its result."""
