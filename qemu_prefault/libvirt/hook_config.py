# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration of the hook and the daemon, by domain and lifecycle event.

A domain's metadata may contain one element whose attributes are the configuration. The ``virsh
metadata DOMAIN urn:qemu-prefault:1 --key prefault --set '<hook restore="now"/>' --config`` command
adds this element::

    <metadata><prefault:hook xmlns:prefault="urn:qemu-prefault:1" restore="now"/></metadata>

The /etc/qemu-prefault/libvirt.toml file configures all domains, or one domain by name::

    [default]
    restore = "now"

    [domain.web1]
    start = "follow"

By default, no domain is prefaulted.
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

#: Maximum value of ``wait``, in seconds. timeout(1) ends the hook after 60 seconds
#: (install.HOOK_TEXT).
LONGEST_WAIT = 50.0


class LifecycleEvent(enum.StrEnum):
    """A lifecycle event for which an action can be configured."""

    START = "start"
    RESTORE = "restore"
    MIGRATE = "migrate"


class When(enum.StrEnum):
    """The action that the hook or the daemon performs at a lifecycle event."""

    #: Do not prefault.
    OFF = "off"
    #: Prefault in the hook, before the guest runs.
    NOW = "now"
    #: Prefault in another process, after the guest has started.
    LATER = "later"
    #: Prefault like ``LATER``, and again whenever KVM drops stage-2 tables.
    FOLLOW = "follow"


@dataclass(frozen=True, slots=True)
class HookConfig:
    """The configuration for one domain.

    :ivar start: The action after a start.
    :ivar restore: The action at a restore.
    :ivar migrate: The action after an incoming migration.
    :ivar wait: The maximum time for which the hook may delay a restored guest, in seconds.
    :ivar populate: The memory to populate, as a value of ``--populate``.
    """

    start: When = When.OFF
    restore: When = When.OFF
    migrate: When = When.OFF
    wait: float = 5.0
    populate: str = "auto"

    def at(self, moment: LifecycleEvent) -> When:
        """Return the action for an event."""
        when: When = getattr(self, moment.value)
        return when


def read(domain: Domain, config: Path = CONFIG) -> HookConfig:
    """Return the configuration of a domain.

    A key in the domain's metadata overrides the key in the domain's table in the file. A key in the
    domain's table overrides the key in ``[default]``.

    :raises InputError: If the metadata or the file is invalid.
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
    # TOMLDecodeError is a ValueError. Deep nesting raises RecursionError.
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{config} could not be read: {error}", "see docs/usage/libvirt.md for the format"
        ) from None
    domains = text.get("domain", {})
    found = [
        (f"[default] in {config}", text.get("default", {})),
        (f"[domain.{name}] in {config}", domains.get(name, {}) if isinstance(domains, dict) else 0),
    ]
    if unknown := text.keys() - {"default", "domain"}:
        raise InputError(
            f"{config} contains an unknown table [{min(unknown)}]",
            "use only the tables [default] and [domain.NAME], as docs/usage/libvirt.md shows",
        )
    return found


def _check(source: str, said: Any) -> None:
    known: dict[str, tuple[str, ...]] = {
        "start": ("off", "later", "follow"),  # not "now": libvirt calls the hook after the start
        "restore": ("off", "now", "later", "follow"),
        "migrate": ("off", "later", "follow"),
        "populate": ("auto", "all", "resident"),
    }
    if not isinstance(said, Mapping):
        raise InputError(f"{source} is not a table", "see docs/usage/libvirt.md for the format")
    for key, value in said.items():
        if key == "wait":
            try:
                fine = 0 < float(value) <= LONGEST_WAIT
            except (TypeError, ValueError, OverflowError):
                fine = False
            wanted = f"numbers of seconds greater than 0, up to {LONGEST_WAIT:g}"
        elif key in known:
            fine, wanted = value in known[key], ", ".join(known[key])
        else:
            raise InputError(
                f"{source} contains an unknown key {key!r}",
                f"use only these keys: {', '.join([*known, 'wait'])}",
            )
        if not fine:
            raise InputError(
                f"{key}={_shown(value)} in {source} is not a valid value",
                f"the valid values are: {wanted}",
            )


def _shown(value: object) -> str:
    # str() raises ValueError for an integer of more than sys.get_int_max_str_digits() digits.
    return "a very large number" if isinstance(value, int) and abs(value) >> 64 else repr(value)
