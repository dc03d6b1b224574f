"""What memory borrows, made by hand: a meter that counts words, embeddings of word counts, a
model that says what it is told to say; and short makers of records."""

import zlib
from collections.abc import Sequence

import numpy as np

from pmd_jax.records import Behavior, Experience, Insight, MultipleChoice, Problem, Verdict


class WordMeter:
    """One token per word; a cut keeps whole words."""

    def count(self, text: str) -> int:
        return len(text.split())

    def cut(self, text: str, max_tokens: int) -> str:
        return " ".join(text.split()[:max_tokens]) if self.count(text) > max_tokens else text


def embed(texts: Sequence[str]) -> np.ndarray:
    """Words counted in 512 buckets, rows of length 1: texts are near that share words."""
    rows = np.zeros((len(texts), 512), np.float32)
    for row, text in zip(rows, texts, strict=True):
        for word in text.lower().split():
            row[zlib.crc32(word.strip(".,?").encode()) % 512] += 1
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Scripted:
    """A `Generate` that replies from a list, or with one function of the chat, and remembers."""

    def __init__(self, replies):
        self.replies = replies
        self.calls = []

    def __call__(self, chats):
        self.calls.append([list(chat) for chat in chats])
        if callable(self.replies):
            return [self.replies(chat) for chat in chats]
        replies, self.replies = self.replies[: len(chats)], self.replies[len(chats) :]
        return list(replies)


def problem(number=0, stem="What is the molar mass of water in grams?", options=None, answer="B"):
    options = options or ("17.03", "18.02", "19.00", "44.01")
    listed = "\n".join(f"{chr(65 + i)}: {option}" for i, option in enumerate(options))
    return Problem(
        id=f"toy/chemistry/train/{number}",
        subject="chemistry",
        subtask="molar_mass",
        stem=stem,
        question=f"{stem}\n\n{listed}",
        system="Answer with a letter.",
        check=MultipleChoice(options, answer),
    )


def attempt(number=0, step=0, sample=0, correct=True, text=None, feedback=""):
    key = f"toy/chemistry/train/{number}"
    text = text if text is not None else f"attempt {sample} of step {step}"
    verdict = Verdict(bool(correct), float(correct), feedback, True)
    return Experience(f"{key}@{step}.{sample}", key, step, text, verdict)


def insight(number=0, step=0, kind="strategy", text=None, ratio=0.5, n=1):
    key = f"toy/chemistry/train/{number}"
    text = text or f"When asked for item {number}, add up part {n} of step {step}."
    return Insight(f"{key}@{step}#{kind}{n}", key, step, kind, text, ratio, (f"{key}@{step}.0",))


def behavior(name="behavior_sum_masses", step=0, kind="skill", when=None, instruction=None, ids=()):
    when = when or "When a molar mass is asked for"
    instruction = instruction or "add up the masses of all atoms, each times its count"
    return Behavior(
        f"{name}@{step}", name, kind, when, instruction, step, tuple(ids), last_used=step
    )
