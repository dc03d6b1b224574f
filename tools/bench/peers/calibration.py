"""The search for a library's fastest setting: sizes in rising order, until more does not help."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Setting = TypeVar("Setting", bound=Hashable)
WORSE = 1.25  # a size so many times slower than the one before ends the search


def climb(
    settings: Iterable[Setting],
    seconds_of: Callable[[Setting], float],
    times: dict[Setting, float],
) -> None:
    """Adds the predicted seconds of the settings to `times`, until they rise.

    A setting that fails (memory, or a way that this device does not know) is reported and passed.
    """
    before = float("inf")
    for setting in settings:
        try:
            seconds = seconds_of(setting)
        except Exception as error:
            print(f"does not work here: {setting}: {error!r}", file=sys.stderr)
            continue
        times[setting] = seconds
        print(f"{seconds:8.1f} s predicted: {setting}", file=sys.stderr)
        if seconds > WORSE * before:
            return
        before = seconds


def fastest(times: dict[Setting, float]) -> Setting:
    if not times:
        raise RuntimeError("no setting works here; what was tried failed as said above")
    return min(times, key=lambda setting: times[setting])
