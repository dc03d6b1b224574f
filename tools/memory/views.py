"""What a bank holds, as a person or a program reads it: show, search and diff.

Tables on a terminal, one line of tab-separated values per entry elsewhere, one JSON object per line
where asked. Texts were written by a model, perhaps a stranger's: what would move a terminal's
cursor is shown as its escape.

Left out: where the bank comes from (artefact.py) and the command line (__main__.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pmd_jax.memory.bank import Bank
from pmd_jax.records import Behavior, from_dict

Level = Literal["experience", "insight", "behavior"]
LEVELS: tuple[Level, ...] = ("experience", "insight", "behavior")
Form = Literal["table", "lines", "json"]

SHOWN_CHARS = 240
"""Of a text in a table; elsewhere it is whole."""

Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One record of a bank as plain values, and something about it in words."""

    level: Level
    fields: Fields
    note: str = ""

    @property
    def id(self) -> str:
        return self.fields["id"]

    @property
    def text(self) -> str:
        if self.level == "behavior":
            return from_dict(Behavior, self.fields).text
        return self.fields["text"]

    @property
    def about(self) -> str:
        f = self.fields
        if self.level == "experience":
            return "correct" if f["verdict"]["correct"] else "wrong"
        if self.level == "insight":
            return f"{f['kind']}, {f['success_ratio']:.0%} correct"
        return f"{f['kind']}, {f['uses']} uses, last at {f['last_used']}"

    @property
    def problem_ids(self) -> frozenset[str]:
        """The problem it is of, or those that a behavior was abstracted from."""
        if self.level == "behavior":
            return frozenset(problem_of(key) for key in self.fields["insight_ids"])
        return frozenset([self.fields["problem_id"]])


def problem_of(key: str) -> str:
    """The problem that the id of an attempt or insight begins with, of an earlier run or not."""
    while key.startswith("earlier:"):
        key = key.removeprefix("earlier:")
    return key.rpartition("@")[0]


def subject_of(problem_id: str) -> str:
    """<task>/<subject>/<split>/<number>."""
    parts = problem_id.split("/")
    return parts[1] if len(parts) > 1 else ""


def entries(bank: Bank, levels: Sequence[Level] = LEVELS) -> list[Entry]:
    """All records, level by level, in the order of the bank's own readers."""
    records = bank.records()
    return [Entry(level, fields) for level in levels for fields in records[f"{level}s"]]


# --- show ---------------------------------------------------------------------------------------


def selected(
    found: Iterable[Entry],
    problem: str | None = None,
    subject: str | None = None,
    step: int | None = None,
    limit: int = 0,
) -> list[Entry]:
    """The entries that fit all that is asked, at most `limit` (0: all) of each level.

    Raises ValueError for a problem or subject that the bank does not know.
    """
    found = list(found)
    known = sorted(set().union(*(entry.problem_ids for entry in found)))
    _check_known("problem", problem, known)
    _check_known("subject", subject, sorted(set(map(subject_of, known))))
    chosen = [
        entry
        for entry in found
        if (problem is None or problem in entry.problem_ids)
        and (subject is None or subject in map(subject_of, entry.problem_ids))
        and (step is None or entry.fields["step"] == step)
    ]
    by_level = itertools.groupby(chosen, key=lambda entry: entry.level)
    return [entry for _, level in by_level for entry in itertools.islice(level, limit or None)]


def _check_known(name: str, value: str | None, known: Sequence[str]) -> None:
    if value is None or value in known:
        return
    close = difflib.get_close_matches(value, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    some = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
    raise ValueError(f"{name}: must be one of the bank's; got {value!r}; {hint}known: {some}")


def show(bank: Bank, chosen: Sequence[Entry], form: Form, console: Console) -> None:
    """The bank's sizes, then entries."""
    sizes = bank.sizes()
    if form == "json":
        print(json.dumps({"sizes": sizes}))
    elif form == "lines":
        print("sizes\t" + "\t".join(f"{name} {size}" for name, size in sizes.items()))
    else:
        table = Table("level", "records", "of these", title="memory", title_justify="left")
        kinds = {
            "experiences": ("successes", "failures"),
            "insights": ("strategies", "lessons"),
            "behaviors": ("skills", "mistakes"),
        }
        for level, names in kinds.items():
            parts = ", ".join(f"{sizes[name]:,} {name}" for name in names)
            table.add_row(level, f"{sizes[level]:,}", parts)
        console.print(table)
        total = sum(sizes[level] for level in kinds)
        console.print(f"{sizes['problems']:,} problems; {len(chosen):,} of {total:,} records below")
    print_entries(chosen, form, console)


def print_entries(chosen: Iterable[Entry], form: Form, console: Console) -> None:
    if form == "json":
        for entry in chosen:
            told = {"note": entry.note} if entry.note else {}
            print(json.dumps({"level": entry.level, **told, **entry.fields}))
        return
    if form == "lines":
        for entry in chosen:
            note = [entry.note] if entry.note else []
            step = str(entry.fields["step"])
            parts = [*note, entry.level, entry.id, step, entry.about, entry.text]
            print("\t".join(map(one_line, parts)))
        return
    for level, group in itertools.groupby(chosen, key=lambda entry: entry.level):
        rows = list(group)
        has_notes = any(entry.note for entry in rows)
        columns = ("id", "step", "about", "text")
        table = Table(*([""] if has_notes else []), *columns, title=level, title_justify="left")
        for entry in rows:
            text = one_line(entry.text)
            shown = text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"
            cells = [entry.id, str(entry.fields["step"]), entry.about, shown]
            note = [entry.note] if has_notes else []
            table.add_row(*(Text(one_line(cell), overflow="fold") for cell in (*note, *cells)))
        console.print(table)


def one_line(text: str) -> str:
    """A text on one line, in which no character acts on a terminal."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


# --- search -------------------------------------------------------------------------------------


def nearest(
    found: Sequence[Entry], words: str, top_k: int, config: Fields
) -> tuple[list[Entry], str]:
    """(the `top_k` entries nearest to `words`, their cosines as notes; what embedded them).

    config: the section `embedding` of the run, {} where that is not known. An encoder whose weights
    would have to be fetched is not used: "hashed", which compares words and characters, stands in.
    """
    import numpy as np

    from pmd_jax import settings
    from pmd_jax.embedding import DEFAULT_PATHS, EmbeddingConfig, make_embed, query_prefix
    from pmd_jax.memory.nearest import nearest as nearest_rows
    from pmd_jax.policy.hub import is_here

    own = settings.build(EmbeddingConfig, config, "config.embedding")
    used = own
    how = "hashed words and characters" + (", as the run retrieved" if config else "")
    if own.backend != "hashed":
        path = own.path or DEFAULT_PATHS[own.backend]
        how = f"{own.backend}, {path}, as the run retrieved"
        if not is_here(path):
            used = EmbeddingConfig()
            how = f"hashed words and characters; the run's {path} is not on this machine"
    embed = make_embed(used)
    if not found:
        return [], how
    query = embed([query_prefix(used) + words])
    chunks = [found[i : i + 1024] for i in range(0, len(found), 1024)]
    rows = np.concatenate([embed([entry.text for entry in chunk]) for chunk in chunks])
    [indices], [cosines] = nearest_rows(query, rows, top_k)
    pairs = zip(indices.tolist(), cosines.tolist(), strict=True)
    return [dataclasses.replace(found[i], note=f"{cosine:.3f}") for i, cosine in pairs], how


# --- diff ---------------------------------------------------------------------------------------


def at_step(bank: Bank, step: int) -> Bank:
    """The bank as it was when everything up to `step` had happened, by replaying its events."""
    past = itertools.takewhile(lambda event: event["step"] <= step, bank.events)
    return Bank.replay(past, bank.config)


def differences(before: Bank, after: Bank) -> Iterator[Entry]:
    """Records that one bank has and the other lacks, and those that changed, level by level.

    The note begins with "added", "removed" or "changed", and says what changed and how.
    """
    for level in LEVELS:
        old = {entry.id: entry for entry in entries(before, [level])}
        new = {entry.id: entry for entry in entries(after, [level])}
        for key in sorted(old.keys() | new.keys()):
            if key not in old:
                yield dataclasses.replace(new[key], note="added")
            elif key not in new:
                yield dataclasses.replace(old[key], note="removed")
            elif changes := _changes(old[key].fields, new[key].fields):
                yield dataclasses.replace(new[key], note="changed " + ", ".join(changes))


def _changes(old: Fields, new: Fields) -> list[str]:
    changes = []
    for name, value in new.items():
        if value == old[name]:
            continue
        was, is_ = (len(v) if isinstance(v, list) else v for v in (old[name], value))
        changes.append(f"{name} {was} -> {is_}" if was != is_ else f"{name} (others)")
    return changes


def diff(before: Bank, after: Bank, form: Form, console: Console) -> int:
    """Prints the differences, and how many; 1 where there are any, as diff(1) says."""
    found = list(differences(before, after))
    counts = {
        level: {
            kind: sum(e.level == level and e.note.startswith(kind) for e in found)
            for kind in ("added", "removed", "changed")
        }
        for level in LEVELS
    }
    if form == "json":
        print(json.dumps({"counts": counts}))
    else:
        for level, kinds in counts.items():
            parts = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
            print(f"{level}: {parts}")
    print_entries(found, form, console)
    return int(bool(found))
