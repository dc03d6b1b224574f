"""What was learned, as text. This room knows no model, no verifier and no JAX: it borrows.

In reading order: bank.py keeps the three levels; retrieval.py finds what fits a question;
prompts.py holds every prompt with the parser of its reply; reflection.py turns attempts into
insights; behaviors.py turns insights of related problems into behaviors; teacher.py puts them into
the teacher's prompt. Below are the three functions that the room is lent. Whoever lends them
decides which model writes and embeds, so that choice is nowhere a branch.

Left out: who calls what, and when. The trainer does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from pmd_jax.records import Message

Generate = Callable[[Sequence[Sequence[Message]]], list[str]]
"""Chats -> one reply per chat, in order. Where the last message of a chat has the role
"assistant", it is a prefix that the model continues; the reply is the continuation alone."""

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts -> float32 [N, D], one row per text, rows of length 1."""


@runtime_checkable
class TextMeter(Protocol):
    """Lengths of text as the policy's tokenizer counts them."""

    def count(self, text: str) -> int:
        """Number of tokens."""
        ...

    def cut(self, text: str, max_tokens: int) -> str:
        """The longest prefix of at most `max_tokens` tokens."""
        ...
