# SPDX-License-Identifier: GPL-2.0-or-later
"""Build the documentation from docs/ with Sphinx.

    make-docs.py html    build the site in the cache (``make docs``)
    make-docs.py man     write the man pages in man/ (``make man``)

The script installs Sphinx and its extensions into the cache.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from qemu_prefault import __version__
from qemu_prefault.cli.main import cli
from qemu_prefault_lab import cache

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = DOCS / "reference" / "commands"
MAN = ROOT / "man"
#: Files that all man pages depend on.
COMMON = (DOCS / "conf.py", DOCS / "_ext" / "prefault_docs.py")
GENERATED = r".\" Written by `make man` from docs/reference/commands; do not edit. Sources: "


# --- hashes of man pages ---


def names() -> list[str]:
    """Return the names of the man pages."""
    return sorted(path.stem for path in PAGES.glob("qemu-prefault*.md"))


def _help_texts(command: click.Command) -> Iterator[str]:
    yield f"{command.name} {command.help} {command.epilog}"
    for param in command.params:
        kind = getattr(param.type, "choices", param.type.name)
        shown = getattr(param, "help", None), getattr(param, "show_default", None)
        yield f"{param.opts} {param.secondary_opts} {param.metavar} {kind} {shown} {param.required}"
        if shown[1]:
            yield str(param.default)
    for _, inner in sorted(getattr(command, "commands", {}).items()):
        yield from _help_texts(inner)


def _field_comments(page: str) -> Iterator[str]:
    """Yield fields and comments from the modules in the page's directives."""
    for module in sorted(set(re.findall(r"json-fields:?:?\}? (?:qemu_prefault\.)([\w.]+):", page))):
        path = ROOT / "qemu_prefault" / f"{module.replace('.', '/')}.py"
        text = path.read_text()
        yield from re.findall(r"^ +(?:#:.*|\w+: [\w\[\], .|]+)$", text, re.MULTILINE)
        yield from re.findall(r":ivar [^:]*:(?:(?!\n *:|\n *\n).)*", text, re.DOTALL)


def digest(name: str) -> str:
    """Return a hash of all sources of the man page."""
    page = (PAGES / f"{name}.md").read_text()
    parts = [__version__, page, *(path.read_text() for path in COMMON)]
    parts += _help_texts(cli)
    parts += _field_comments(page)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


# --- building ---


def install_sphinx() -> Path:
    """Return a directory with the packages for docs/, installed unless cached."""
    requirements = DOCS / "requirements.txt"

    def install(directory: Path) -> None:
        print("setup: installing Sphinx (pip, into the cache)", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "-q", "install"]
        pip += ["--require-hashes", "--only-binary", ":all:"]
        argv = [*pip, "--target", str(directory), "-r", str(requirements)]
        subprocess.run(argv, check=True)

    return cache.entry("docs", cache.key_of(requirements.read_bytes(), sys.version), install)


def sphinx(builder: str, output: Path, scratch: Path, *options: str) -> int:
    """Run Sphinx without its cache, because the pages depend on the code.

    :returns: Sphinx's exit status.
    """
    argv = [sys.executable, "-m", "sphinx", "-q", "-E", *options, "-b", builder]
    argv += ["-d", str(scratch / "doctrees"), str(DOCS), str(output)]
    environment = {**os.environ, "PYTHONPATH": str(install_sphinx())}
    return subprocess.run(argv, env=environment, check=False).returncode


def make_man(scratch: Path) -> int:
    """Write the man pages, and return an exit status.

    :param scratch: A directory for intermediate files. Two checkouts must not share it.
    """
    output = scratch / "man"
    status = sphinx("man", output, scratch)
    if status:
        return status
    MAN.mkdir(exist_ok=True)
    for old in MAN.glob("*.1"):
        old.unlink()
    for name in names():
        text = (output / f"{name}.1").read_text()
        # Omit the build date, so that a rebuild does not change the page. Disable hyphenation,
        # which would also hyphenate the names of commands.
        header = re.compile(r'^(\.TH "[^"]*" "1") "[^"]*"(.*)', re.MULTILINE)
        text, count = header.subn(r'\1 ""\2\n.nr HY 0\n.ad l', text)
        assert count == 1, name
        (MAN / f"{name}.1").write_text(f"{GENERATED}{digest(name)}\n{text}")
    print(MAN)
    return 0


def make_html(scratch: Path) -> int:
    """Build the site, and return an exit status.

    All checkouts use the same output directory, so only one build runs at a time.
    """
    output = cache.subdirectory("docs")
    with cache.locked("docs-html"):
        status = sphinx("html", output, scratch, "-W", "--keep-going")
    if not status:
        print(output / "index.html")
    return status


def main() -> int:
    makers = {"html": make_html, "man": make_man}
    if len(sys.argv) != 2 or sys.argv[1] not in makers:
        print(f"usage: {sys.argv[0]} html|man", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="qemu-prefault-docs-") as scratch:
        return makers[sys.argv[1]](Path(scratch))


if __name__ == "__main__":
    sys.exit(main())
