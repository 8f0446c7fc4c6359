# SPDX-License-Identifier: GPL-2.0-or-later
"""Mutate inputs, feed them to a parser, and collect the faults.

A parser must return a value or raise a documented error. The parser's CPU time and memory must be
bounded. All other behaviour is a fault. The inputs depend only on the seed.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import hashlib
import json
import random
import re
import resource
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qemu_prefault.errors import QemuPrefaultError

#: Seconds of CPU time for one input.
CPU_SECONDS: Final = 1.0
#: Seconds after which the process exits if it is blocked where no signal handler can run.
HANG_SECONDS: Final = 300
#: The maximum growth of the address space in bytes.
MEMORY: Final = 2 << 30
#: The usual limit of a mutated input in bytes. A few inputs are longer, up to :data:`LONG`.
NORMAL: Final = 16 << 10
LONG: Final = 256 << 10

Mutate = Callable[[random.Random, Sequence[bytes]], bytes]


class TooSlowError(BaseException):
    """A parser exceeded the CPU time limit for one input."""


# --- mutations ---

NUMBERS: Final = (
    *(b"0", b"-1", b"1", b"7", b"00000000000000000000000", b"4095", b"4096", b"65535", b"65536"),
    *(b"2147483647", b"2147483648", b"4294967295", b"4294967296", b"9223372036854775807"),
    *(b"9223372036854775808", b"18446744073709551615", b"18446744073709551616"),
    *(b"99999999999999999999999", b"9" * 5000, b"0-999999", b"0-9999", b"ffffffffffffffff"),
    *(b"fffffffffffff000", b"0xffffffffffffffff", b"0x10000000000000000", b"1e999", b"NaN", b"1_0"),
    *("٣".encode(), "²".encode(), "١٢٣".encode(), b"+5", b" 5", b"0x", b"1.5"),
)  # fmt: skip
TOKENS: Final = (
    *(b"\0", b"\n", b"\r", b"\r\n", b"\t", b" ", b"  ", b"\x0b", b"\x0c", b"\x1c", b"\x85"),
    *(b":", b"::", b"/", b"//", b"/..", b"..", b"-", b",", b",,", b"=", b"@", b"(", b")", b" - "),
    *(b"\\040", b"\\000", b"\\377", b"\\777", b"\\", b'"', b"'", b"<", b">", b"&", b"%s", b"#"),
    *(b"\xff", b"\xfe", b"\xc3", b"\xc3\x28", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"),
    *("\u2028".encode(), "\u00a0".encode(), "\U0001f40c".encode(), b"max", b"kB", b"KVM"),
)  # fmt: skip
_NUMBER: Final = re.compile(rb"(?:0x)?[0-9a-f]+")
_WORD: Final = re.compile(rb"[^\s:,=/-]+")


def _slice(rng: random.Random, data: bytes, most: int = 64) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.randrange(1, most))


def _replace_match(
    rng: random.Random, data: bytes, pattern: re.Pattern[bytes], new: bytes
) -> bytes:
    match = pattern.search(data, rng.randrange(len(data) + 1)) or pattern.search(data)
    return data[: match.start()] + new + data[match.end() :] if match else data + new


def _edit_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    here, there = rng.randrange(len(lines)), rng.randrange(len(lines))
    choice = rng.randrange(4)
    if choice == 0:
        lines[here], lines[there] = lines[there], lines[here]
    elif choice == 1:
        lines.insert(here, lines[there])
    elif choice == 2:
        del lines[here]
    else:
        del lines[here + 1 :]
    return b"\n".join(lines)


def _mutate_once(rng: random.Random, data: bytes, pool: Sequence[bytes]) -> bytes:  # noqa: PLR0911
    choice = rng.randrange(13)
    start, end = _slice(rng, data)
    if choice == 0 and data:
        at = rng.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if choice == 1:
        return data[:start] + rng.randbytes(rng.randrange(1, 9)) + data[end:]
    if choice == 2:
        return data[:start] + data[end:]
    if choice == 3:
        return data[:end] + data[start:]
    if choice in (4, 5):
        return data[:start] + rng.choice(TOKENS) + data[start:]
    if choice in (6, 7):
        return _replace_match(rng, data, _NUMBER, rng.choice(NUMBERS))
    if choice == 8:
        return _replace_match(rng, data, _WORD, rng.choice(TOKENS + NUMBERS))
    if choice == 9:
        other = rng.choice(pool)
        return data[:start] + other[rng.randrange(len(other) + 1) :]
    if choice == 10 and rng.randrange(20) == 0:
        part = data[start:end] or b"("
        size = rng.choice((1000, 10_000, 100_000))
        return (data[:start] + part * (size // len(part)) + data[start:])[:LONG]
    if choice == 11:
        return data[:start]
    return _edit_lines(rng, data)


def mutate_bytes(rng: random.Random, pool: Sequence[bytes]) -> bytes:
    """Return a mutation of one of the inputs."""
    data = rng.choice(pool)
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        data = _mutate_once(rng, data, pool)
        if len(data) > NORMAL and len(data) < LONG // 4:
            data = data[:NORMAL]
    return data


#: Placeholders, and the deeply nested arrays that replace the placeholders after serialization,
#: because json.dumps() cannot write such arrays.
DEEP: Final = {b'"@deep@"': b"[" * 400 + b"]" * 400, b'"@deeper@"': b"[" * 50_000 + b"]" * 50_000}
VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, 1, -1, 7, 4096, 1 << 31, 1 << 63, 1 << 64, -(1 << 70), 10**400),
    *(0.5, 1e308, float("nan"), float("inf"), "", "x", "@deep@", "@deep@", "@deeper@"),
    *("\0", "\ud800", "/", "/objects/m0", "KVM" * 2000, [], {}, [[]], [{}], {"": None}, [None]),
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return the container and the key of every value inside a JSON value."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        item = todo.pop()
        pairs = item.items() if isinstance(item, dict) else enumerate(item)
        for key, inner in pairs:
            found.append((item, key))
            if isinstance(inner, (dict, list)):
                todo.append(inner)
    return found


def _mutate_value(rng: random.Random, value: Any, places: list[tuple[Any, Any]]) -> Any:
    if isinstance(value, str) and rng.randrange(2):
        return mutate_bytes(rng, [value.encode(errors="surrogatepass")]).decode(errors="replace")
    if type(value) is int and rng.randrange(3) == 0:
        return value + rng.choice((-1, 1, -4096, 4096, 1 << 32, 1 << 63))
    choice = rng.randrange(8)
    if choice == 0:
        container, key = rng.choice(places)
        return copy.deepcopy(container[key])
    if choice == 1:
        return [value]
    if choice == 2:
        return {rng.choice(("id", "name", "type", "")): value}
    return copy.deepcopy(rng.choice(VALUES))


def mutate_json(rng: random.Random, pool: Sequence[bytes]) -> bytes:
    """Return a mutation of the structure or the values of one JSON document."""
    try:
        document = [json.loads(rng.choice(pool))]
    except (ValueError, RecursionError):  # a kept input that is not JSON
        return mutate_bytes(rng, pool)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        places = _places(document)
        container, key = rng.choice(places)
        value, choice = container[key], rng.randrange(10)
        if choice == 0 and container is not document:
            del container[key]
        elif choice == 1 and isinstance(value, list) and value:
            value.append(copy.deepcopy(rng.choice(value)))
        elif choice == 2 and isinstance(value, dict):
            value[rng.choice(("error", "id", "event", "x"))] = copy.deepcopy(rng.choice(VALUES))
        else:
            container[key] = _mutate_value(rng, value, places)
    text = json.dumps(document[0]).encode()[:LONG]
    for mark, deep in DEEP.items():
        text = text.replace(mark, deep)
    return text if rng.randrange(20) else _mutate_once(rng, text, pool)


def mutate_json_lines(rng: random.Random, pool: Sequence[bytes]) -> bytes:
    """Return an input of JSON lines with one mutated line."""
    lines = rng.choice(pool).split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(rng, [lines[at]])
    return b"\n".join(lines)


# --- runs ---


@dataclass(frozen=True)
class Target:
    """A parser, and valid inputs from which the mutations start.

    :ivar errors: The errors that the parser is allowed to raise.
    :ivar cost: The relative time that parsing one input takes. The value for a short text is 1.
    """

    name: str
    parse: Callable[[bytes], object]
    seeds: Sequence[bytes]
    mutate: Mutate = mutate_bytes
    errors: tuple[type[Exception], ...] = (QemuPrefaultError,)
    cost: int = 1


@dataclass(frozen=True)
class Fault:
    """A fault of a parser, with the input that causes it."""

    kind: str
    data: bytes
    detail: str

    def __str__(self) -> str:
        shown = repr(self.data[:400]) + ("…" if len(self.data) > 400 else "")
        return f"{self.kind}\n  input of {len(self.data)} bytes: {shown}\n{self.detail}"


def run_one(target: Target, data: bytes) -> Fault | None:
    """Feed one input to a parser and return the fault, or None."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        target.parse(data)
    except target.errors as error:
        str(error)
    except (Exception, TooSlowError) as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "qemu_prefault" in f.filename] or frames
        place = f"{Path(ours[-1].filename).name}:{ours[-1].name}"
        detail = "".join(traceback.format_exception(error, limit=-6))
        return Fault(f"{type(error).__name__} in {place}", data, detail)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return None


def _too_slow(*_: object) -> None:
    raise TooSlowError(f"more than {CPU_SECONDS:g} s of CPU time")


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Limit memory within the block, and let :func:`run_one` limit the CPU time."""
    before = signal.signal(signal.SIGPROF, _too_slow)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def _shrink(target: Target, fault: Fault) -> Fault:
    """Remove parts of an input while the input still causes the same kind of fault."""
    if "TooSlowError" in fault.kind:
        return fault
    best, step, tries = fault, max(1, len(fault.data) // 2), 0
    while step and tries < 400:
        at = 0
        while at < len(best.data) and tries < 400:
            tries += 1
            found = run_one(target, best.data[:at] + best.data[at + step :])
            if found is not None and found.kind == fault.kind:
                best = found
            else:
                at += step
        step //= 2
    return best


class Corpus:
    """The kept inputs of a parser, each in its own file."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self) -> list[bytes]:
        """Return the inputs, in the order of their names."""
        return [path.read_bytes() for path in sorted(self._directory.glob("*"))]

    def add(self, fault: Fault) -> Path:
        """Keep the input of a fault, and return its path."""
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / hashlib.sha256(fault.data).hexdigest()[:16]
        path.write_bytes(fault.data)
        return path


def find_faults(target: Target, corpus: Sequence[bytes], count: int, seed: int) -> list[Fault]:
    """Feed a parser its seeds, the corpus, and ``count`` mutations of both.

    :returns: One fault of each kind, with a shortened input.
    """
    rng = random.Random(f"{seed} {target.name}")
    pool = [*target.seeds, *(data for data in corpus if len(data) <= NORMAL)]
    found: dict[str, Fault] = {}

    def inputs() -> Iterator[bytes]:
        yield from target.seeds
        yield from corpus
        for _ in range(count):
            yield target.mutate(rng, pool)

    with limits():
        for number, data in enumerate(inputs()):
            if number % 1000 == 0:
                faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=2)
            fault = run_one(target, data)
            if fault is not None and fault.kind not in found:
                found[fault.kind] = _shrink(target, fault)
                if len(found) >= 20:
                    break
    return list(found.values())
