# SPDX-License-Identifier: GPL-2.0-or-later
"""The C parts, sorted by what they are linked into."""
