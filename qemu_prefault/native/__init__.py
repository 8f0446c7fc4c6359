# SPDX-License-Identifier: GPL-2.0-or-later
"""The C sources, grouped by the binary that they are linked into."""
