# SPDX-License-Identifier: GPL-2.0-or-later
"""Check the types and ranges of values in QEMU's JSON replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from ..errors import LayoutError


def expect_object(value: object, what: str) -> Mapping[str, object]:
    """Return ``value`` if it is a JSON object.

    :param what: The name of the value, for the error message.
    :raises LayoutError: If ``value`` has another type.
    """
    if not isinstance(value, dict):
        raise _wrong(value, what, "an object")
    return cast("dict[str, object]", value)


def expect_array(value: object, what: str) -> Sequence[object]:
    """Return ``value`` if it is a JSON array.

    :param what: The name of the value, for the error message.
    :raises LayoutError: If ``value`` has another type.
    """
    if not isinstance(value, list):
        raise _wrong(value, what, "an array")
    return cast("list[object]", value)


def expect_str(value: object, what: str) -> str:
    """Return ``value`` if it is a JSON string.

    :param what: The name of the value, for the error message.
    :raises LayoutError: If ``value`` has another type.
    """
    if not isinstance(value, str):
        raise _wrong(value, what, "a string")
    return value


def expect_bool(value: object, what: str) -> bool:
    """Return ``value`` if it is a JSON boolean.

    :param what: The name of the value, for the error message.
    :raises LayoutError: If ``value`` has another type.
    """
    if not isinstance(value, bool):
        raise _wrong(value, what, "a boolean")
    return value


def expect_int(value: object, what: str, low: int = 0, high: int = (1 << 64) - 1) -> int:
    """Return ``value`` if it is a JSON integer within ``low..high`` (inclusive).

    :param what: The name of the value, for the error message.
    :raises LayoutError: If ``value`` is out of range, or if it has another type such as ``true`` or
        ``1.0``.
    """
    if type(value) is not int:
        raise _wrong(value, what, "an integer")
    if not low <= value <= high:
        raise _wrong(value, what, f"within {low}..{high}")
    return value


def _wrong(value: object, what: str, wanted: str) -> LayoutError:
    # Do not call repr() on a container, because it recurses into nested containers.
    if isinstance(value, (dict, list)):
        shown = "an object" if isinstance(value, dict) else "an array"
    elif isinstance(value, int) and value.bit_length() > 64:
        shown = f"a number of {value.bit_length()} bits"  # str() refuses very long integers
    else:
        shown = quote(value if isinstance(value, str) else str(value)[:80])
    return LayoutError(f"{what} should be {wanted}, but is {shown}")


def quote(text: str) -> str:
    """Return a text in quotes, and shorten it to about 120 characters."""
    return repr(text if len(text) <= 120 else text[:117] + "...")
