# SPDX-License-Identifier: GPL-2.0-or-later
"""Sphinx directives that document qemu-prefault from its own code.

``command-options`` shows the options of a click command, without the section that sphinx-click
adds. ``error-codes`` shows every ``errors.Code`` with its comment, and the errors that have the
code. ``json-fields`` shows the fields of the object that a ``to_json()`` method returns.
``event-fields`` shows the events of ``--follow`` with their fields.

A directive logs a warning if a description is missing, or if a description is for a name that the
code does not have. `make docs` treats warnings as errors.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import os
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging
from sphinx_click.ext import ClickDirective

import qemu_prefault
from qemu_prefault import errors

LOG = logging.getLogger(__name__)
PACKAGE = Path(qemu_prefault.__file__).parent
ROOT = Path(__file__).resolve().parents[2]


def parse(directive: Directive, lines: list[str]) -> list[nodes.Node]:
    """Parse reStructuredText, and return its nodes."""
    parent = nodes.Element()
    directive.state.nested_parse(StringList(lines, "generated"), directive.content_offset, parent)
    return parent.children


def definition(term: str, kind: str, text: str) -> list[str]:
    """Return an entry of a definition list, as reStructuredText."""
    return [f"``{term}``" + (f" : {kind}" if kind else ""), f"    {text}", ""]


# --- commands ---


class CommandOptions(ClickDirective):
    """The ``command-options:: MODULE:COMMAND`` directive. It needs ``:prog:``."""

    def run(self) -> list[nodes.Node]:
        self.options["nested"] = "none"
        (section,) = super().run()
        return [
            node
            for node in section.children
            if not isinstance(node, (nodes.title, nodes.rubric, nodes.section))
        ]


def drop_lines(app: Sphinx, context: Any, lines: list[str]) -> None:
    """Remove a part of sphinx-click's text, because the pages have their own text."""
    lines.clear()


def edit_options(app: Sphinx, context: Any, lines: list[str]) -> None:
    """Edit the text that sphinx-click generates for the options.

    Show the choices of an option as its value, show its default as a sentence, and add ``--help``.
    """
    found: list[str] = []
    option = 0
    for line in lines:
        if line.startswith(".. option::"):
            option = len(found)
            found.append(re.sub(r"<([a-z_]+)>", lambda match: match[0].upper(), line))
        elif choices := re.match(r" +:options: (.*)", line):
            before, _, _ = found[option].partition("<")
            found[option] = f"{before}<{choices[1].replace(' ', '')}>"
        elif default := re.match(r" +:default: ``'?(.*?)'?``", line):
            if not found[-1].strip():
                found.pop()
            found[-1] += f" Default: {default[1]}."
        else:
            found.append(line.replace("**Required** ", "Required. "))
    lines[:] = found
    lines += [".. option:: -h, --help", "", "    Print a summary of the options, and exit.", ""]


# --- errors ---


def attribute_docs(module: str) -> dict[tuple[str, str], str]:
    """Return the docs of a module's attributes, by class and name."""
    docs = ModuleAnalyzer.for_module(module).find_attr_docs()
    return {key: " ".join(line.strip() for line in text).strip() for key, text in docs.items()}


def field_doc(owner: type, field: str) -> str:
    """Return the description of a dataclass field from ``:ivar`` or ``#:``."""
    text = re.search(rf":ivar {field}: (.+?)(?=\n\s*:|\n\s*\n|\Z)", owner.__doc__ or "", re.DOTALL)
    if text:
        return " ".join(text[1].split())
    return attribute_docs(owner.__module__).get((owner.__name__, field), "")


def code_users() -> dict[str, set[str]]:
    """Return the names of error classes that use a code, by name in ``errors.Code``.

    A warning that uses the code adds the name ``RunWarning``.
    """
    users: dict[str, set[str]] = {}

    def members(node: ast.AST) -> Iterator[str]:
        for inner in ast.walk(node):
            match inner:
                case ast.Attribute(value=ast.Name(id="Code"), attr=name):
                    yield name

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            if name.endswith("Error") or name == "RunWarning":
                for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                    for member in members(argument):
                        users.setdefault(member, set()).add(name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            # The engine collects warnings by code: warnings[Code.RESET] = "…"
            for member in members(node.targets[0].slice):
                users.setdefault(member, set()).add("RunWarning")
        elif isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
            for statement in node.body:
                if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value:
                    for member in members(statement.value):
                        users.setdefault(member, set()).add(node.name)
        for child in ast.iter_child_nodes(node):
            visit(child)

    for path in PACKAGE.rglob("*.py"):
        if "deprecated" not in path.parts:
            visit(ast.parse(path.read_text()))
    return users


def carried_by(names: set[str]) -> tuple[str, str]:
    """Return the names of error classes, and their exit statuses, as two texts."""
    statuses = set()
    for name in names:
        kind = getattr(errors, name, None)
        statuses.add(str(int(kind.exit_status)) if kind else "")
    shown = sorted("warning" if name == "RunWarning" else f"``{name}``" for name in names)
    return ", ".join(shown), ", ".join(sorted(filter(None, statuses)))


class ErrorCodes(Directive):
    """The ``error-codes::`` directive, which writes a table of all codes.

    Each line of the body names a code whose class is chosen at run time, and this class.
    """

    has_content = True

    def run(self) -> list[nodes.Node]:
        docs = attribute_docs("qemu_prefault.errors")
        users = code_users()
        for code, kind in described(self.content).items():
            users.setdefault(errors.Code(code).name, set()).add(kind)
        rows = []
        for member in errors.Code:
            text = docs.get(("Code", member.name), "")
            if not text:
                LOG.warning("errors.Code.%s has no #: comment", member.name)
            if member.name not in users:
                LOG.warning("errors.Code.%s is not used by any error or warning", member.name)
            kinds, status = carried_by(users.get(member.name, set()))
            rows.append((f"``{member.value}``", text.replace("`", "``"), kinds, status))
        return parse(self, list_table(("code", "meaning", "class", "exit"), rows, "20 50 22 8"))


def list_table(headers: tuple[str, ...], rows: list[tuple[str, ...]], widths: str) -> list[str]:
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {widths}", ""]
    for row in (headers, *rows):
        for number, cell in enumerate(row):
            lines.append(("   * - " if number == 0 else "     - ") + cell)
    return lines


# --- JSON ---

JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", dict: "object"}


class Sample:
    """A factory of dataclass objects in which each value is unique.

    A value in the JSON output therefore identifies the field that has this value.
    """

    def __init__(self) -> None:
        self._number = itertools.count(1001)
        #: The class, field name and type of each unique value.
        self.origins: dict[Any, tuple[type, str, str]] = {}
        #: The same by field name, for values that cannot be unique, for example Booleans.
        self.by_name: dict[str, tuple[type, str, str]] = {}

    def make(self, kind: type) -> Any:
        """Return an object of the dataclass ``kind``, with unique values."""
        hints = typing.get_type_hints(kind)
        values = {}
        for field in dataclasses.fields(kind):
            value = self._value(hints[field.name])
            values[field.name] = value
            origin = kind, field.name, self._type_name(hints[field.name])
            self.by_name.setdefault(field.name, origin)
            if not isinstance(value, (bool, tuple, dict)):
                self.origins.setdefault(value, origin)
        return kind(**values)

    def _value(self, hint: Any) -> Any:
        arguments = typing.get_args(hint)
        value: Any = f"text {next(self._number)}"
        if isinstance(hint, types.UnionType):
            value = self._value(arguments[0])
        elif typing.get_origin(hint) is tuple:
            value = (self._value(arguments[0]),)
        elif typing.get_origin(hint) is dict:
            # The values of a dict[str, Any] have no type to show.
            value = {"*": None if Any in arguments else next(self._number)}
        elif dataclasses.is_dataclass(hint):
            value = self.make(typing.cast(type, hint))
        elif hint is bool:
            value = True
        elif isinstance(hint, type) and issubclass(hint, errors.ExitStatus):
            value = errors.ExitStatus.PARTIAL
        elif hint in (int, float):
            value = hint(next(self._number))
        return value

    @staticmethod
    def _type_name(hint: Any) -> str:
        arms = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        names = [JSON_TYPES.get(arm, "null" if arm is type(None) else "") for arm in arms]
        return " or ".join(filter(None, names))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of each field of a JSON value.

    Examples of paths are ``bytes.requested`` and ``sections[].gpa``.
    """
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, (list, tuple)) and value:
        yield from leaves(value[0], f"{path}[]")
    else:
        yield path, value


#: Descriptions of the fields that every object has.
COMMON = {
    "schema": "The version of this format.",
    "exit": "The exit status of the command.",
}


def described(content: StringList) -> dict[str, str]:
    """Return the descriptions in a directive's ``NAME: description`` lines.

    An indented line continues the previous line.
    """
    found: dict[str, str] = {}
    name = ""
    for line in content:
        if line[:1].isspace() and name:
            found[name] += f" {line.strip()}"
        elif line.strip():
            name, _, text = line.partition(": ")
            found[name] = text.strip()
    return found


class JsonFields(Directive):
    """The ``json-fields:: MODULE:DATACLASS`` directive, which lists the fields.

    The body describes the fields that have no ``#:`` comment.
    """

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        module_name, _, class_name = self.arguments[0].partition(":")
        kind = getattr(importlib.import_module(module_name), class_name)
        sample = Sample()
        value = sample.make(kind).to_json()
        own = described(self.content)
        lines: list[str] = []
        for path, leaf in leaves(value):
            name = re.split(r"[.\[]", path.removesuffix("[]"))[-1].strip("]")
            origin = None if isinstance(leaf, bool) else sample.origins.get(leaf)
            origin = origin or sample.by_name.get(name)
            text = own.pop(path, COMMON.get(path, ""))
            type_name = JSON_TYPES.get(type(leaf), "integer" if isinstance(leaf, int) else "")
            if origin is not None:
                owner, field, type_name = origin[0], origin[1], origin[2] or type_name
                text = text or field_doc(owner, field)
            # JSON has null where Python has None.
            text = re.sub(r"\bNone\b", "null", text)
            if not text:
                LOG.warning("%s: the JSON field %s is not described", self.arguments[0], path)
            lines += definition(path, type_name, text)
        for path in own:
            LOG.warning("%s: unknown JSON field %s", self.arguments[0], path)
        return parse(self, lines)


# --- events ---


def tool_events() -> dict[str, set[str]]:
    """Return the events that engine/follow.py creates, with their fields.

    An event is a dictionary with a literal ``event`` key.
    """
    found: dict[str, set[str]] = {}
    follow = importlib.import_module("qemu_prefault.engine.follow")
    for node in ast.walk(ast.parse(inspect.getsource(follow))):
        if isinstance(node, ast.Dict):
            keys = [key.value if isinstance(key, ast.Constant) else "" for key in node.keys]
            if "event" in keys:
                name = ast.literal_eval(node.values[keys.index("event")])
                found.setdefault(name, set()).update(set(keys) - {"event"})
    return found


def plugin_events() -> dict[str, set[str]]:
    """Return the events that the plugin logs, with their fields."""
    found: dict[str, set[str]] = {}
    for path in sorted((PACKAGE / "native" / "plugin").glob("*.c")):
        if path.name == "event_log.c":
            continue
        for call in re.findall(r"\bpf_log_event\((.*?)\);", path.read_text(), re.DOTALL):
            subject, _, rest = call.partition(",")
            fields = set(re.findall(r'\\"(\w+)\\":', rest)) | {"time"}
            if not rest.lstrip().startswith("NULL"):
                fields.add("why")
            for name in re.findall(r'"([a-z-]+)"', subject):
                found.setdefault(name, set()).update(fields)
    return found


class EventFields(Directive):
    """The ``event-fields:: tool|plugin`` directive, which lists the events.

    The body of the directive describes each event.
    """

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        found = tool_events() if self.arguments[0] == "tool" else plugin_events()
        texts = described(self.content)
        lines: list[str] = []
        for name, fields in sorted(found.items()):
            if name not in texts:
                LOG.warning("the event %s is not described", name)
            shown = ", ".join(f"``{field}``" for field in sorted(fields))
            lines += definition(name, "", f"{texts.pop(name, '')} Fields: {shown}.")
        for name in texts:
            LOG.warning("unknown event %s", name)
        return parse(self, lines)


# --- links ---

LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)\s]*)?\)")


def resolve_source_links(app: Sphinx, document: str, source: list[str]) -> None:
    """Replace links to files outside docs/ by paths.

    The site does not contain these files.
    """
    folder = (Path(app.srcdir) / document).parent

    def replace(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        path = Path(os.path.normpath(folder / target))
        if path.is_relative_to(app.srcdir):
            return match[0]
        if not path.exists():
            LOG.warning("%s: the file %s does not exist", document, target)
        name = str(path.relative_to(ROOT))
        return f"`{name}`" if text.strip("`").rstrip("/") == name else f"{text} (`{name}`)"

    source[0] = LINK.sub(replace, source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("command-options", CommandOptions)
    app.add_directive("error-codes", ErrorCodes)
    app.add_directive("json-fields", JsonFields)
    app.add_directive("event-fields", EventFields)
    app.connect("source-read", resolve_source_links)
    for part in ("description", "usage", "arguments", "epilog"):
        app.connect(f"sphinx-click-process-{part}", drop_lines)
    app.connect("sphinx-click-process-options", edit_options)
    return {"parallel_read_safe": True}
