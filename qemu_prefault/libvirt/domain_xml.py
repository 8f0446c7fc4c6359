# SPDX-License-Identifier: GPL-2.0-or-later
"""Add the plugin to domain XML, remove it, and read the domain's properties.

This module edits the XML as text, at byte offsets that a parser reports. All other bytes stay
unchanged, including comments, prefixes and white space. If the module wrote the XML from an element
tree, prefixes would be lost and namespace declarations would move.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from xml.parsers import expat

from ..errors import Code, InputError, RefusedError, UnsupportedError

#: XML namespace of libvirt's <qemu:commandline>.
QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
#: XML namespace of qemu-prefault's element in <metadata>.
OWN_NAMESPACE = "urn:qemu-prefault:1"
PLUGIN_NAME = "qemu-prefault-plugin.so"

#: A tag from ``<`` to ``>``. Attribute values may contain ``>``.
_TAG = re.compile(rb"<(?:[^>\"']|\"[^\"]*\"|'[^']*')*>")
_UNITS = {
    **{"b": 1, "bytes": 1, "": 1 << 10},  # the default unit is KiB
    **{"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"k": 1 << 10, "KiB": 1 << 10, "M": 1 << 20, "MiB": 1 << 20},
    **{"G": 1 << 30, "GiB": 1 << 30, "T": 1 << 40, "TiB": 1 << 40},
}


@dataclass
class Element:
    """An XML element with its byte offsets.

    :ivar start: The offset at which the start tag begins.
    :ivar tag_end: The offset after the start tag.
    :ivar end: The offset after the whole element.
    """

    namespace: str
    name: str
    attributes: Mapping[str, str]
    start: int
    tag_end: int
    end: int = 0
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def find(self, path: str, namespace: str = "") -> Element | None:
        """Return the first descendant at the path ``a`` or ``a/b``, or None."""
        found: Element | None = self
        for name in path.split("/"):
            found = next(found.all(name, namespace), None) if found else None
        return found

    def all(self, name: str, namespace: str = "") -> Iterator[Element]:
        """Return an iterator over the children with the name ``name``."""
        return (c for c in self.children if (c.namespace, c.name) == (namespace, name))


@dataclass(frozen=True, slots=True)
class Loaded:
    """The path and the options with which a domain loads the plugin."""

    path: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Edited:
    """Edited XML, and whether it differs from the input."""

    xml: bytes
    changed: bool


@dataclass(frozen=True, slots=True)
class Domain:
    """The properties of a domain that the hook, the daemon and probe use.

    :ivar memory: Boot memory of all NUMA nodes, in bytes.
    :ivar current: Current memory in bytes. This includes boot memory and memory devices, but
        neither the memory in the balloon nor unplugged memory.
    :ivar huge: Whether hugetlb pages back the memory.
    :ivar devices: Models of the memory devices.
    :ivar nodes: Number of NUMA nodes.
    :ivar own: Attributes of qemu-prefault's element in ``<metadata>``, or None if it is absent.
    """

    name: str
    uuid: str
    kvm: bool
    machine: str
    memory: int
    current: int
    huge: bool
    devices: tuple[str, ...]
    nodes: int
    own: Mapping[str, str] | None


def parse(xml: bytes) -> Element:
    """Parse domain XML.

    :raises InputError: If the input is not valid XML, or if its root element is not ``<domain>``.
    """
    root = _Reader(xml).read()
    if (root.namespace, root.name) != ("", "domain"):
        raise InputError(
            f"the root element of this XML is <{root.name}>, not <domain>",
            "pass the output of: virsh dumpxml --inactive DOMAIN",
        )
    return root


def describe(xml: bytes) -> Domain:
    """Return the properties of a domain.

    :raises InputError: If the XML cannot be parsed.
    """
    root = parse(xml)
    memory = _size(root.find("memory"))
    current = _size(root.find("currentMemory")) or memory
    devices = root.find("devices")
    pluggable = list(devices.all("memory")) if devices else []
    # <memory> includes the size of memory devices.
    extra = sum(_size(device.find("target/size")) for device in pluggable)
    metadata = root.find("metadata")
    machine = root.find("os/type")
    numa = root.find("cpu/numa")
    own = metadata and next((c for c in metadata.children if c.namespace == OWN_NAMESPACE), None)
    return Domain(
        name=_text(root.find("name")),
        uuid=_text(root.find("uuid")),
        kvm=root.attributes.get("type") == "kvm",
        machine=machine.attributes.get("machine", "") if machine else "",
        memory=memory - extra,
        current=current,
        huge=root.find("memoryBacking/hugepages") is not None,
        devices=tuple(device.attributes.get("model", "") for device in pluggable),
        nodes=len(list(numa.all("cell"))) if numa else 1,
        own=dict(own.attributes) if own else None,
    )


def loaded(xml: bytes) -> Loaded | None:
    """Return the plugin that the domain loads, or None."""
    pairs = list(_plugin_arguments(parse(xml)))
    if not pairs:
        return None
    path, *options = pairs[0][1].attributes["value"].split(",")
    return Loaded(path, tuple(options))


def enable(xml: bytes, path: str, options: Sequence[str] = ()) -> Edited:
    """Add the plugin to the domain, or change its path and options.

    :param path: The path of the plugin on the host.
    :param options: The plugin's options, each in the form ``KEY=VALUE``.
    :raises UnsupportedError: If the domain cannot use the plugin.
    :raises RefusedError: If the domain already loads the plugin with LD_PRELOAD.
    """
    root = parse(xml)
    _refuse(root)
    value = ",".join([path, *options])
    pairs = list(_plugin_arguments(root))
    if len(pairs) == 1:
        second = pairs[0][1]
        if second.attributes["value"] == value:
            return Edited(xml, False)
        prefix = _prefix(xml, second)
        return _checked(_splice(xml, (second.start, second.end, _argument(prefix, value))))
    if pairs:
        xml = disable(xml).xml
        root = parse(xml)
    commandline = root.find("commandline", QEMU_NAMESPACE)
    if commandline is None:
        declared = _declared_prefix(xml, root)
        edits: list[tuple[int, int, bytes]] = []
        prefix = declared or b"qemu"
        if declared is None:
            if re.search(rb"\sxmlns:qemu\s*=", xml[root.start : root.tag_end]):
                prefix = b"qemu-prefault"  # the prefix "qemu" is used for another namespace
            place = root.start + len(b"<domain")
            edits.append((place, place, b" xmlns:%s='%s'" % (prefix, QEMU_NAMESPACE.encode())))
        lines = [b"  <%s:commandline>" % prefix, *_arguments(prefix, value, b"    ")]
        text = b"".join(b"\n" + line for line in [*lines, b"  </%s:commandline>" % prefix])
        place = root.children[-1].end if root.children else root.tag_end
        return _checked(_splice(xml, *edits, (place, place, text)))
    prefix = _prefix(xml, commandline)
    indent = _indent(xml, commandline) + b"  "
    text = b"".join(b"\n" + line for line in _arguments(prefix, value, indent))
    if xml[commandline.tag_end - 2 : commandline.tag_end] == b"/>":
        opened = xml[commandline.start : commandline.tag_end - 2].rstrip() + b">"
        closed = b"\n%s</%s>" % (indent[:-2], _raw_name(xml, commandline))
        return _checked(_splice(xml, (commandline.start, commandline.end, opened + text + closed)))
    # libvirt's schema requires the arguments before the environment variables.
    arguments = list(commandline.all("arg", QEMU_NAMESPACE))
    place = arguments[-1].end if arguments else commandline.tag_end
    return _checked(_splice(xml, (place, place, text)))


def disable(xml: bytes) -> Edited:
    """Remove the plugin, and everything else that :func:`enable` added."""
    root = parse(xml)
    pairs = list(_plugin_arguments(root))
    if not pairs:
        return Edited(xml, False)
    gone = [element for pair in pairs for element in pair]
    commandline = root.find("commandline", QEMU_NAMESPACE)
    assert commandline is not None
    if all(child in gone for child in commandline.children):
        gone = [commandline]
    edits = [(_before(xml, element), element.end, b"") for element in gone]
    if gone == [commandline] and not any(
        child.namespace == QEMU_NAMESPACE for child in root.children if child is not commandline
    ):
        pattern = rb"\s+xmlns:[^\s=]+\s*=\s*([\"'])%s\1" % re.escape(QEMU_NAMESPACE.encode())
        declared = re.search(pattern, xml[root.start : root.tag_end])
        if declared:
            start, end = (root.start + place for place in declared.span())
            edits.append((start, end, b""))
    return _checked(_splice(xml, *edits))


# --- details ---


class _Reader:
    """Parses XML into a tree of :class:`Element`."""

    def __init__(self, xml: bytes) -> None:
        self._xml = xml
        self._open: list[Element] = []
        self._root: Element | None = None

    def read(self) -> Element:
        parser = self._parser = expat.ParserCreate(namespace_separator=" ")
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text
        parser.StartDoctypeDeclHandler = self._doctype
        parser.buffer_text = True
        # UTF-16, with or without a byte order mark. libvirt never writes UTF-16.
        if self._xml.startswith((b"\xff\xfe", b"\xfe\xff", b"<\0", b"\0<")):
            raise _not_utf8()
        try:
            parser.Parse(self._xml, True)
        except (expat.ExpatError, LookupError, ValueError) as error:
            # LookupError and ValueError: Python or expat does not support the encoding.
            raise InputError(
                f"the input is not valid XML: {error}",
                "pass the output of: virsh dumpxml --inactive DOMAIN",
                code=Code.BAD_XML,
            ) from None
        assert self._root is not None
        return self._root

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        namespace, _, local = name.rpartition(" ")
        start = self._parser.CurrentByteIndex
        tag = _TAG.match(self._xml, start)
        if tag is None:
            raise _not_utf8()
        element = Element(namespace, local, attributes, start, tag.end())
        if self._open:
            self._open[-1].children.append(element)
        else:
            self._root = element
        self._open.append(element)

    def _end(self, _name: str) -> None:
        element = self._open.pop()
        if self._xml[element.tag_end - 2 : element.tag_end] == b"/>":
            element.end = element.tag_end
        else:
            tag = _TAG.match(self._xml, self._parser.CurrentByteIndex)
            if tag is None:
                raise _not_utf8()
            element.end = tag.end()

    def _text(self, text: str) -> None:
        self._open[-1].text += text

    def _doctype(self, *_: object) -> None:
        raise InputError(
            "this XML contains a DOCTYPE, which domain XML must not contain",
            "remove the DOCTYPE",
            code=Code.BAD_XML,
        )


def _not_utf8() -> InputError:
    return InputError(
        "this XML is not in UTF-8", "convert it: iconv -f UTF-16 -t UTF-8", code=Code.BAD_XML
    )


def _text(element: Element | None) -> str:
    return element.text.strip() if element else ""


def _size(element: Element | None) -> int:
    if element is None:
        return 0
    try:
        return int(_text(element)) * _UNITS[element.attributes.get("unit", "")]
    except (ValueError, KeyError):
        raise InputError(
            f"the domain's <{element.name}> is not a size: {_text(element)[:40]!r}",
            "correct the size: virsh edit DOMAIN",
            code=Code.BAD_XML,
        ) from None


def _refuse(root: Element) -> None:
    kind = root.attributes.get("type")
    if kind != "kvm":
        raise UnsupportedError(
            f"this domain has type {kind!r}, so its guest does not run under KVM",
            "use <domain type='kvm'>, because guests of other types have no stage-2 tables",
            code=Code.NOT_KVM,
        )
    machine = root.find("os/type")
    arch = machine.attributes.get("arch") if machine else None
    if arch not in (None, "x86_64", "i686"):
        raise UnsupportedError(
            f"this domain's architecture is {arch}",
            "use an x86-64 domain, because qemu-prefault supports only x86-64",
            code=Code.NOT_X86,
        )
    commandline = root.find("commandline", QEMU_NAMESPACE)
    for variable in commandline.all("env", QEMU_NAMESPACE) if commandline else ():
        if PLUGIN_NAME in variable.attributes.get("value", ""):
            raise RefusedError(
                "this domain already loads the plugin with LD_PRELOAD",
                "remove that <qemu:env> first: virsh edit DOMAIN",
                code=Code.PRELOADED,
            )


def _plugin_arguments(root: Element) -> Iterator[tuple[Element, Element]]:
    """Yield the two <qemu:arg> elements of each ``-plugin`` that names the plugin."""
    commandline = root.find("commandline", QEMU_NAMESPACE)
    arguments = list(commandline.all("arg", QEMU_NAMESPACE)) if commandline else []
    for first, second in itertools.pairwise(arguments):
        path = second.attributes.get("value", "").partition(",")[0]
        name = path.removeprefix("file=").rpartition("/")[2]
        if first.attributes.get("value") in ("-plugin", "--plugin") and name == PLUGIN_NAME:
            yield first, second


def _declared_prefix(xml: bytes, root: Element) -> bytes | None:
    """Return the prefix that the root element declares for libvirt's QEMU namespace."""
    pattern = rb"\sxmlns:([^\s=]+)\s*=\s*([\"'])%s\2" % re.escape(QEMU_NAMESPACE.encode())
    found = re.search(pattern, xml[root.start : root.tag_end])
    return found[1] if found else None


def _raw_name(xml: bytes, element: Element) -> bytes:
    return re.split(rb"[\s/>]", xml[element.start + 1 : element.tag_end], maxsplit=1)[0]


def _prefix(xml: bytes, element: Element) -> bytes:
    return _raw_name(xml, element).rpartition(b":")[0]


def _argument(prefix: bytes, value: str) -> bytes:
    # An empty prefix means that the default namespace is libvirt's QEMU namespace.
    name = b"%s:arg" % prefix if prefix else b"arg"
    return b"<%s value=%s/>" % (name, _quoted(value))


def _quoted(value: str) -> bytes:
    # xml.sax.saxutils imports much of urllib, which would slow down the hook.
    for mark, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("'", "&apos;")):
        value = value.replace(mark, entity)
    return f"'{value}'".encode()


def _arguments(prefix: bytes, value: str, indent: bytes) -> list[bytes]:
    return [indent + _argument(prefix, word) for word in ("-plugin", value)]


def _before(xml: bytes, element: Element) -> int:
    """Return the offset at which the white space before an element starts."""
    return len(xml[: element.start].rstrip())


def _indent(xml: bytes, element: Element) -> bytes:
    line = xml[: element.start].rpartition(b"\n")[2]
    return line if not line.strip() else b"  "


def _splice(xml: bytes, *edits: tuple[int, int, bytes]) -> bytes:
    for start, end, text in sorted(edits, reverse=True):
        xml = xml[:start] + text + xml[end:]
    return xml


def _checked(xml: bytes) -> Edited:
    """Check that edited XML is still domain XML, and return it."""
    parse(xml)
    return Edited(xml, True)
