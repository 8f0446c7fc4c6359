# SPDX-License-Identifier: GPL-2.0-or-later
"""Sphinx configuration of the documentation site and of the man pages."""

import sys
from pathlib import Path

import qemu_prefault

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "qemu-prefault"
author = "The qemu-prefault developers"
release = version = qemu_prefault.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click", "prefault_docs"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_ext", "requirements.txt"]

myst_enable_extensions = ["deflist", "colon_fence"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"qemu-prefault {release}"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False

man_show_urls = False
COMMANDS = "reference/commands"
man_pages = [
    (f"{COMMANDS}/{name}", name, summary, [], 1)
    for name, summary in (
        ("qemu-prefault", "fill the stage-2 page tables of a running QEMU/KVM guest"),
        ("qemu-prefault-probe", "report whether a QEMU guest can be prefaulted on this host"),
        ("qemu-prefault-map", "show the RAM of a QEMU guest"),
        ("qemu-prefault-stats", "show KVM's page table and fault counters of a QEMU guest"),
        ("qemu-prefault-run", "start QEMU with the prefault plugin"),
        ("qemu-prefault-plugin-path", "print the path of the prefault plugin"),
        ("qemu-prefault-conformance", "test KVM_PRE_FAULT_MEMORY on this host"),
        ("qemu-prefault-demo", "measure what prefaulting changes, without real hardware"),
        ("qemu-prefault-libvirt", "prefault the guests that libvirt starts"),
    )
]
