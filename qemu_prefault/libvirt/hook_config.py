# SPDX-License-Identifier: GPL-2.0-or-later
"""What is to be done for which domain, and when: its metadata says so, or a file does.

In the domain, attributes of one element (``virsh metadata DOMAIN urn:qemu-prefault:1 --key
prefault --set '<hook restore="now"/>' --config``)::

    <metadata><prefault:hook xmlns:prefault="urn:qemu-prefault:1" restore="now"/></metadata>

or in /etc/qemu-prefault/libvirt.toml, for all domains and for one::

    [default]
    restore = "now"

    [domain.web1]
    start = "follow"

What nobody asks for is not done.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .domain_xml import Domain
from .install import CONFIG

LONGEST_WAIT = 50.0
"""The hook itself is ended after a minute: see install.py."""


class LifecycleEvent(enum.StrEnum):
    """When a QEMU of libvirt's gets a guest."""

    START = "start"
    RESTORE = "restore"
    MIGRATE = "migrate"


class When(enum.StrEnum):
    """:cvar NOW: in the hook, before the guest runs. :cvar LATER: when it does, in a process
    of its own. :cvar FOLLOW: likewise, and again whenever its tables were dropped."""

    OFF = "off"
    NOW = "now"
    LATER = "later"
    FOLLOW = "follow"


@dataclass(frozen=True, slots=True)
class HookConfig:
    """:ivar wait: seconds a restored guest may be kept waiting for. :ivar populate: as
    ``--populate``."""

    start: When = When.OFF
    restore: When = When.OFF
    migrate: When = When.OFF
    wait: float = 5.0
    populate: str = "auto"

    def at(self, moment: LifecycleEvent) -> When:
        when: When = getattr(self, moment.value)
        return when


def read(domain: Domain, config: Path = CONFIG) -> HookConfig:
    """The domain's own words, else the file's about it, else the file's default.

    :raise InputError: one of them is not understood.
    """
    words: dict[str, Any] = {}
    for source, said in (*_in_file(config, domain.name), ("<metadata>", domain.own or {})):
        _check(source, said)
        words |= said
    typed: dict[str, Any] = {
        key: When(value) if key in tuple(LifecycleEvent) else value for key, value in words.items()
    }
    if "wait" in typed:
        typed["wait"] = float(typed["wait"])
    return HookConfig(**typed)


def _in_file(config: Path, name: str) -> list[tuple[str, Mapping[str, Any]]]:
    import tomllib  # noqa: PLC0415

    try:
        text = tomllib.loads(config.read_text())
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{config} could not be read: {error}", "see docs/libvirt.md") from None
    domains = text.get("domain", {})
    found = [
        (f"[default] of {config}", text.get("default", {})),
        (f"[domain.{name}] of {config}", domains.get(name, {}) if isinstance(domains, dict) else 0),
    ]
    if unknown := text.keys() - {"default", "domain"}:
        raise InputError(f"{config} has an unknown table [{min(unknown)}]", "see docs/libvirt.md")
    return found


def _check(source: str, said: Any) -> None:
    known: dict[str, tuple[str, ...]] = {
        "start": ("off", "later", "follow"),  # the guest runs when libvirt tells of it
        "restore": ("off", "now", "later", "follow"),
        "migrate": ("off", "later", "follow"),
        "populate": ("auto", "all", "resident"),
    }
    if not isinstance(said, Mapping):
        raise InputError(f"{source} is no table", "see docs/libvirt.md")
    for key, value in said.items():
        if key == "wait":
            try:
                fine = 0 < float(value) <= LONGEST_WAIT
            except (TypeError, ValueError):
                fine = False
            wanted = f"seconds, {LONGEST_WAIT:g} at most"
        elif key in known:
            fine, wanted = value in known[key], ", ".join(known[key])
        else:
            raise InputError(
                f"{source} has an unknown key {key!r}", f"there are: {', '.join([*known, 'wait'])}"
            )
        if not fine:
            raise InputError(f"{key}={value!r} of {source} is not understood", f"write: {wanted}")
