"""Verifiers of multiple-choice answers: a response's text -> Verdict. Total over all texts.

strict   exactly SDPO's rule (lasgroup/SDPO, `sdpo_mcq`): what stands between the last "<answer>"
         and the next "</answer>" must be the letter. So a bare letter and an unclosed tag count,
         a lower-case letter does not.
lenient  that, or else exactly one identifiable letter. For models that do not follow the format.

`well_formed` asks for more in both: a closed tag with one of the problem's letters at the end.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from pmd_jax.records import MultipleChoice, Verdict

Mode = Literal["strict", "lenient"]


def extract_answer(check: MultipleChoice, text: str, mode: Mode) -> str:
    """The letter that the response chose, "" when it chose none; for grading and majority votes."""
    strict = text.split("<answer>")[-1].split("</answer>")[0].strip()
    if strict in check.letters:
        return strict
    return _identified(check, text) if mode == "lenient" else ""


def _identified(check: MultipleChoice, text: str) -> str:
    """The one letter that the text names as its answer; "" for none or for several."""
    letter = f"([{''.join(check.letters)}])"
    options = "|".join(re.escape(option.strip()) for option in check.options)
    # A recopied option, "A: 12 g", is no answer.
    text = re.sub(rf"(?m)^\s*{letter}\s*[:.)]\s*(?:{options})\s*$", "", text)
    tagged = re.findall(r"<answer>\s*(.*?)\s*(?:</answer>|$)", text, re.DOTALL | re.IGNORECASE)
    if tagged:
        found = re.match(rf"[*(\[]*{letter}[*)\]]*(?![A-Za-z'])", tagged[-1], re.IGNORECASE)
        return found[1].upper() if found else ""
    said = re.findall(
        rf"(?i:\banswer\s*(?:is|:|=)|\b(?:option|choose|choice|select)\b(?:\s+is)?)\s*:?\s*"
        rf"[*(\[]*{letter}[*)\]]*(?![A-Za-z'])",
        text,
    )
    if not said:
        said = re.findall(rf"\*\*{letter}\*\*|\(({letter[1:-1]})\)|^\s*{letter}\s*[.)]?\s*$", text)
        said = ["".join(parts) for parts in said]
    return said[0] if len(set(said)) == 1 else ""


def is_well_formed(check: MultipleChoice, text: str) -> bool:
    letters = "|".join(check.letters)
    return re.search(rf"<answer>\s*({letters})\s*</answer>\s*$", text) is not None


@dataclasses.dataclass(frozen=True)
class LetterVerifier:
    """Grades multiple-choice answers by `mode`."""

    mode: Mode = "strict"
    about = ""  # nothing that a run has to say at its start

    def verify(self, check: MultipleChoice, text: str, feedback: bool) -> Verdict:
        return verify(check, text, self.mode, feedback)

    def answer(self, check: MultipleChoice, text: str) -> str:
        return extract_answer(check, text, self.mode)


def verify(check: MultipleChoice, text: str, mode: Mode, feedback: bool = False) -> Verdict:
    """Reward 1 when the chosen letter is the answer, else 0.

    feedback False says nothing, as SDPO; True says what was wrong, never what is right.
    """
    chosen = extract_answer(check, text, mode)
    correct = chosen == check.answer
    said = ""
    if feedback and not correct:
        said = (
            f"The answer {chosen} is not correct."
            if chosen
            else "The response does not end with an answer of the form <answer>LETTER</answer>."
        )
    return Verdict(correct, float(correct), said, is_well_formed(check, text))
