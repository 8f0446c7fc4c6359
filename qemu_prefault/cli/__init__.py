# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line, which has one module for each command."""
