"""What devices send each other, read from the text of a compiled program."""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_COLLECTIVE = re.compile(rf" = ([^=]*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b[a-z]+\d*\w*\[([\d,]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|\w+_computations?)=(\{.*?\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective. shapes: of its results, as one device has them.

    loops: trips of the loops around it, the outermost first; 0 where only the run decides.
    """

    kind: str
    shapes: tuple[Shape, ...]
    loops: tuple[int, ...]

    @property
    def times(self) -> int:
        """How often a run of the program comes to it."""
        return math.prod(self.loops)


def shapes(text: str) -> list[Shape]:
    """Of all arrays that the text names: f32[8,4]{1,0} is (8, 4)."""
    return [tuple(int(n) for n in sizes.split(",") if n) for sizes in _ARRAY.findall(text)]


def _results(text: str, kind: str, start: bool) -> tuple[Shape, ...]:
    """What is made. The start of most kinds holds what it reads, what it makes and u32[] words."""
    if not start or kind == "all-reduce":
        return tuple(shapes(text))
    held = shapes(text.replace("u32[]", ""))
    return tuple(held[len(held) // 2 :])


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the one that runs first."""
    found: dict[str, list[str]] = {}
    name = entry = ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
            found[name] = []
        elif line.startswith(" ") and name:
            found[name].append(line)
    return found, entry


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program, `compiled.as_text()`."""
    computations, entry = _computations(text)

    def walk(name: str, loops: tuple[int, ...]) -> Iterator[Collective]:
        for line in computations[name]:
            if found := _COLLECTIVE.search(line):
                made, kind, start = found.groups()
                yield Collective(kind, _results(made, kind, bool(start)), loops)
            trips = _TRIPS.search(line)
            for role, names in _CALLED.findall(line):
                inner = (*loops, int(trips[1]) if trips else 0) if role == "body" else loops
                for called in re.findall(r"[\w.\-]+", names):
                    yield from walk(called, inner)

    return list(walk(entry, ()))
