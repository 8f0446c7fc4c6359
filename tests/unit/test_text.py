# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that text from outside cannot control a terminal or a log.

Such text reaches the output of real commands here, in names, paths, XML and exceptions.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qemu_prefault
from qemu_prefault.text import LONGEST_LOG_LINE, json_text, log_text, printable

PACKAGE = Path(qemu_prefault.__file__).parent
TOOL = [sys.executable, "-m", "qemu_prefault"]
#: An ANSI escape, C1 controls, a bidirectional override, line ends, a surrogate and a priority.
HOSTILE = "a\x1b[2J\x9b31m\u202e\u2066b\r\n<0>forged\u2028\x85\x00c"
#: Like HOSTILE, without the characters that arguments and XML cannot contain.
ARGUMENT = HOSTILE.replace("\x00", "")
IN_XML = "a\x9b31m\u202e\u2066b\n<0>forged\u2028\x85c"
UUID = "0d8b2c1e-5a55-4b7e-9c1f-7e1d2c3b4a59"


def assert_harmless(output: str) -> None:
    """Check that each line is printable, that no line is forged, and that none has a priority."""
    for line in output.split("\n"):
        assert line.isprintable(), ascii(line)
        assert not re.match(r"\s*<[0-9]{1,3}>", line), line
        assert not line.startswith("forged"), line


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*TOOL, *arguments],
        input=text,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert_harmless(done.stdout + done.stderr)
    return done


@pytest.mark.parametrize("priority", ["<0>", "<7>", "<03>", "<004>", " <1>", "x\n<2>"])
def test_priorities_are_escaped(priority: str) -> None:
    assert_harmless(printable(f"{priority}text"))
    assert "<" not in printable(f"{priority}text")
    assert printable("a < b > c <x> <8192>") == "a < b > c <x> <8192>"


def test_every_harmful_character_is_escaped() -> None:
    for number in range(sys.maxunicode + 1):
        assert printable(chr(number)).isprintable(), hex(number)


def test_json_has_no_priority_and_the_same_value() -> None:
    data = {"name": f"{HOSTILE}\udcff\x7f"}
    assert_harmless(json_text(data))
    assert "<0>" not in json_text(data)
    assert json.loads(json_text(data)) == data


def test_log_lines_are_short() -> None:
    for text in ("x" * 1_000_000, "\x1b" * 1_000_000):
        assert len(log_text(text)) == LONGEST_LOG_LINE
    assert log_text("x" * LONGEST_LOG_LINE) == "x" * LONGEST_LOG_LINE


@pytest.mark.parametrize(
    "arguments",
    [
        ["--qmp", f"/nowhere/{ARGUMENT}"],
        ["--qmp", f"/nowhere/{ARGUMENT}", "--debug"],
        ["--qmp", f"/nowhere/{ARGUMENT}", "--json"],
        ["--domain", ARGUMENT],
        [f"--{ARGUMENT}"],
        [ARGUMENT],
        ["map", ARGUMENT],
        ["libvirt", "enable", "-", "-o", ARGUMENT],
        ["libvirt", "enable", "x", "--plugin", f"/{ARGUMENT}"],
        ["libvirt", "restore", ARGUMENT],
        ["libvirt", "install", "--root", f"/dev/null/{ARGUMENT}"],
        ["libvirt", "watch", "--listen", ARGUMENT],
        ["conformance", "-k", ARGUMENT],
        ["run", f"/nowhere/{ARGUMENT}"],
    ],
    ids=lambda arguments: " ".join(arguments).replace(ARGUMENT, "X"),
)
def test_arguments_are_escaped(arguments: list[str]) -> None:
    assert run(*arguments).returncode not in (0, 3)


def test_domain_names_are_escaped() -> None:
    name = IN_XML.replace("<", "&lt;")
    xml = f"<domain type='kvm'><name>{name}</name><uuid>{UUID}</uuid></domain>"
    assert "forged" in run("libvirt", "status", "-", text=xml).stdout
    metadata = "<metadata><p:x xmlns:p='urn:qemu-prefault:1' start='follow'/></metadata>"
    xml = xml.replace("<uuid>", f"{metadata}<memory>1024</memory><uuid>")
    assert "forged" in run("libvirt", "hook", ARGUMENT, "started", "begin", "-", text=xml).stderr


FAILURES = {
    "uncaught": "raise ValueError(text)",
    "cause": "try: raise ValueError(text)\nexcept ValueError as e: raise OSError(text) from e",
    "group": "raise ExceptionGroup(text, [ValueError(text)])",
    "thread": "import threading as t\na = t.Thread(target=int, args=(text,))\na.start()\na.join()",
    "unraisable": "class A:\n    def __del__(self):\n        raise ValueError(text)\nA()",
    "logger": "import logging\nlogging.getLogger('qemu.qmp').error('x %s', text)",
    "traceback": "import logging\ntry:\n    raise ValueError(text)\n"
    "except ValueError:\n    logging.getLogger('asyncio').exception(text)",
    "malformed": "import logging\nlogging.getLogger('x').error('%d', text)",
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_exceptions_and_records_are_escaped(name: str) -> None:
    program = (
        "import sys\nfrom qemu_prefault.cli.console import reporting\n"
        "with reporting(False, True): pass\n"
        f"text = {HOSTILE!r}\n{FAILURES[name]}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert_harmless(done.stderr)
    assert ("forged" in done.stderr) is (name != "malformed")
    for line in done.stderr.split("\n"):
        assert "forged" not in line or "\\n" in line


# --- no function bypasses the module ---

#: The only modules that write text to a stream.
WRITERS = {"text.py"}
#: Calls that write data, which no terminal shows: XML for libvirt and the shell.
DATA = {"sys.stdout.buffer.write"}
FORBIDDEN = re.compile(
    r"print|(click\.)?(echo|secho|confirm|prompt)|pprint(\.pprint)?|sys\.(__)?std(out|err)(__)?\..*write.*"
    r"|warnings\.showwarning|logging\.(StreamHandler|FileHandler|basicConfig|lastResort)"
    r"|traceback\.print_\w+|faulthandler\.\w+|.*\.print_(help|usage)"
)


def calls(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def test_no_call_bypasses_the_module() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name not in WRITERS
        for line, name in calls(path)
        if FORBIDDEN.fullmatch(name) and name not in DATA
    ]
    assert found == []


def test_syslog_gets_printable_text() -> None:
    """Check that the argument of each call to syslog() is a result of log_text()."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if "syslog.syslog(" in text:
            assert re.search(r"line = log_text\(.*\)\n +syslog\.syslog\(syslog\.\w+, line\)", text)
