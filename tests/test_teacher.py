"""The teacher's prompt: SDPO's texts to the letter, memory in between, and never over budget."""

import dataclasses

import fakes
import numpy as np
import pytest
from fakes import WordMeter, attempt, behavior, insight

from pmd_jax.memory.bank import Bank, MemoryConfig
from pmd_jax.memory.recall import Recalled
from pmd_jax.memory.teacher import (
    SOURCES,
    TEMPLATE_TOKENS_PER_MESSAGE,
    TeacherConfig,
    build_teacher_prompts,
    check_budget,
)
from pmd_jax.records import Rollout, Verdict

PROBLEM = fakes.problem()
STUDENT = (
    {"role": "system", "content": "Answer with a letter."},
    {"role": "user", "content": PROBLEM.question},
)
SDPO = TeacherConfig(sources=("sibling", "feedback"))
PMD = TeacherConfig()
CLOSING = "\n\nCorrectly solve the original question."


def group(outcomes, step=5, feedback="", texts=None):
    none = np.zeros(0)
    return [
        (
            Rollout(
                PROBLEM.id, step, s, texts[s] if texts else f"solution {s}",
                none.astype(np.int32), none.astype(np.float32), "stop",
            ),
            Verdict(bool(ok), float(ok), "" if ok else feedback, True),
        )
        for s, ok in enumerate(outcomes)
    ]  # fmt: skip


def remembering():
    bank = Bank(MemoryConfig())
    bank.remember(1, [attempt(step=1, text="an old right answer")])
    new = [insight(text="When S, do T."), insight(kind="lesson", text="When U, avoid V.")]
    bank.rewrite_insights(1, PROBLEM.id, new)
    return bank


def build(outcomes, config=SDPO, bank=None, behaviors=(), seed=0, student=STUDENT, **about):
    bank = bank or Bank(MemoryConfig())
    recalled = Recalled(bank.insights(PROBLEM.id), bank.experiences(PROBLEM.id), tuple(behaviors))
    return build_teacher_prompts(
        group(outcomes, **about), PROBLEM, recalled, student, WordMeter(), config, seed
    )


def said(prompt):
    return prompt.messages[-1]["content"]


def tokens(prompt):
    meter = WordMeter()
    overhead = TEMPLATE_TOKENS_PER_MESSAGE * (len(prompt.messages) + 1)
    return overhead + sum(meter.count(m["content"]) for m in prompt.messages)


# --- what SDPO shows -------------------------------------------------------------------------


def test_sdpos_solution_text_to_the_letter():
    (_, prompt) = build([1, 0])
    assert said(prompt) == (
        f"{PROBLEM.question}\nCorrect solution:\n\nsolution 0"
        "\n\nCorrectly solve the original question."
    )
    assert prompt.messages[0] == STUDENT[0]


def test_sdpos_feedback_text_to_the_letter():
    (prompt,) = build([0], feedback="Wrong sign.")
    assert said(prompt) == (
        f"{PROBLEM.question}\nThe following is feedback from your unsuccessful earlier attempt:"
        "\n\nWrong sign.\n\nCorrectly solve the original question."
    )


def test_feedback_beside_a_solution_only_if_asked_for():
    assert "Wrong sign." not in said(build([1, 0], feedback="Wrong sign.")[1])
    config = dataclasses.replace(SDPO, feedback_only_without_sibling=False)
    text = said(build([1, 0], config, feedback="Wrong sign.")[1])
    assert text.index("solution 0") < text.index("Wrong sign.")


def test_nothing_to_show_leaves_the_students_prompt():
    for prompt in (*build([0, 0]), build([1, 0])[0]):
        assert prompt.messages == STUDENT
        assert not prompt.has_guidance
        assert prompt.cited == ()


@pytest.mark.parametrize("seed", range(8))
def test_one_demonstration_for_the_group_and_never_ones_own(seed):
    prompts = build([1, 0, 1, 0, 1, 0], seed=seed)
    shown = {prompt.rollout_id: prompt.cited for prompt in prompts}
    assert all(len(cited) == 1 and cited[0] != key for key, cited in shown.items())
    common = shown[f"{PROBLEM.id}@5.1"]
    others = [key for key, cited in shown.items() if cited != common]
    assert others == list(common)  # only the demonstrator is shown another
    assert len({said(prompt) for prompt in prompts}) == 2
    assert prompts[1].messages == prompts[3].messages == prompts[5].messages


def test_the_demonstration_depends_on_seed_problem_and_step_alone():
    first = {tuple(p.cited for p in build([1] * 6, seed=s)) for s in range(20)}
    assert len(first) > 5
    assert [p.cited for p in build([1] * 6, seed=3)] == [p.cited for p in build([1] * 6, seed=3)]


def test_thinking_is_not_demonstrated_and_a_thought_alone_is_no_solution():
    texts = ["<think>so\nlong</think>\n\nB", "x", "<think>only</think>"]
    prompts = build([1, 0, 1], texts=texts)
    assert "\nCorrect solution:\n\nB\n\nCorrectly" in said(prompts[1])
    assert not prompts[0].has_guidance


# --- what memory shows -----------------------------------------------------------------------


def test_sections_come_in_order_and_are_cited():
    prompts = build([1, 0], PMD, remembering(), [behavior()])
    assert said(prompts[1]) == (
        f"{PROBLEM.question}"
        "\nStrategies from earlier correct attempts:\n\n- When S, do T."
        "\nLessons from earlier failed attempts:\n\n- When U, avoid V."
        f"\nRelevant behaviors:\n\n- {behavior().text}"
        f"\nCorrect solution:\n\nsolution 0{CLOSING}"
    )
    assert prompts[1].cited == (
        f"{PROBLEM.id}@0#strategy1", f"{PROBLEM.id}@0#lesson1",
        "behavior_sum_masses@0", f"{PROBLEM.id}@5.0",
    )  # fmt: skip
    assert list(prompts[1].section_tokens) == ["strategies", "lessons", "behaviors", "sibling"]
    assert prompts[1].cut_tokens == {}
    assert prompts[0].has_guidance  # a lone success learns from memory
    assert "Correct solution" not in said(prompts[0])


@pytest.mark.parametrize("source", SOURCES)
def test_each_source_shows_its_own_sections_alone(source):
    config = TeacherConfig(sources=(source,))
    prompts = build([1, 0], config, remembering(), [behavior()], feedback="Wrong sign.")
    sections = {"insights": {"strategies", "lessons"}}.get(source, {source})
    assert set(prompts[1].section_tokens) == sections


def test_a_kept_success_stands_in_where_no_sibling_does():
    config = TeacherConfig(sources=("sibling", "experience"))
    bank = remembering()
    bank.remember(5, [attempt(step=5, sample=0, text="of this very group")])
    alone, _ = build([1, 0], config, bank)
    assert said(alone).endswith(
        f"\nCorrect solution from an earlier visit:\n\nan old right answer{CLOSING}"
    )
    assert alone.cited == (f"{PROBLEM.id}@1.0",)
    assert "earlier visit" not in said(build([1, 0], config, bank)[1])


def test_worked_examples_before_the_question_are_kept():
    shots = ({"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"})
    student = (STUDENT[0], *shots, STUDENT[1])
    prompt = build([1, 0], student=student)[1]
    assert prompt.messages[:3] == student[:3]
    assert said(prompt).startswith(PROBLEM.question)


def test_a_prompt_that_does_not_end_with_the_user_is_refused():
    with pytest.raises(ValueError, match="must end with the user's turn"):
        build([1], student=STUDENT[:1])


def test_top_k_behaviors_are_shown():
    many = [behavior(f"behavior_{n}") for n in "abcde"]
    assert len(build([0], PMD, behaviors=many)[0].cited) == 3


# --- budgets ---------------------------------------------------------------------------------


def test_a_demonstration_is_cut_to_its_budget():
    config = dataclasses.replace(SDPO, sibling_tokens=6)
    prompt = build([1, 0], config, texts=["one two three four five six", "x"])[1]
    assert "\nCorrect solution:\n\none two three four\n\nCorrectly" in said(prompt)
    assert (prompt.section_tokens, prompt.cut_tokens) == ({"sibling": 6}, {"sibling": 2})


def test_insights_are_shown_whole_or_not_at_all_and_in_turn():
    bank = Bank(MemoryConfig())
    new = [
        insight(kind=kind, n=n, ratio=1 - n / 10, text=f"{kind} {n} " + "abcdef"[n] * 3)
        for kind in ("strategy", "lesson")
        for n in (1, 2)
    ]
    bank.rewrite_insights(1, PROBLEM.id, new)
    # A heading takes 5 words and an item 4.
    (prompt,) = build([0], dataclasses.replace(PMD, insight_tokens=18), bank)
    assert prompt.cited == tuple(f"{PROBLEM.id}@0#{k}" for k in ("strategy1", "lesson1"))
    (prompt,) = build([0], dataclasses.replace(PMD, insight_tokens=22), bank)
    assert prompt.cited == tuple(
        f"{PROBLEM.id}@0#{k}" for k in ("strategy1", "strategy2", "lesson1")
    )
    assert prompt.section_tokens == {"strategies": 13, "lessons": 9}
    assert prompt.cut_tokens == {"lessons": 4}


@pytest.mark.parametrize("limit", range(60, 110, 3))
def test_the_whole_prompt_keeps_to_its_limit_and_behaviors_give_way_first(limit):
    config = dataclasses.replace(PMD, max_prompt_tokens=limit)
    full = build([1, 0], PMD, remembering(), [behavior()])[1]
    prompt = build([1, 0], config, remembering(), [behavior()])[1]
    assert tokens(prompt) <= limit
    importance = ["sibling", "strategies", "lessons", "behaviors"]
    have = [name in prompt.section_tokens for name in importance]
    assert have == sorted(have, reverse=True)
    for name in importance:
        missing = full.section_tokens[name] - prompt.section_tokens.get(name, 0)
        assert prompt.cut_tokens.get(name, 0) == missing


def test_a_demonstration_longer_than_the_prompt_takes_all_of_its_room():
    config = TeacherConfig(max_prompt_tokens=80)
    prompt = build([1, 0], config, remembering(), texts=["word " * 200, "x"])[1]
    assert tokens(prompt) == 80
    assert list(prompt.section_tokens) == ["sibling"]
    assert prompt.cut_tokens["sibling"] == 202 - prompt.section_tokens["sibling"]
    assert prompt.cited == (f"{PROBLEM.id}@5.0",)


def test_the_closing_line_survives_every_cut():
    for limit in range(50, 90):
        prompt = build([1, 0], TeacherConfig(max_prompt_tokens=limit), remembering())[1]
        assert prompt.messages == STUDENT or said(prompt).endswith(CLOSING)


def test_a_problem_too_long_is_named_before_training():
    def student(problem):
        return (STUDENT[0], {"role": "user", "content": problem.question})

    long = fakes.problem(7, stem="word " * 100)
    check_budget([PROBLEM, long], student, WordMeter(), PMD)
    tight = TeacherConfig(max_prompt_tokens=60)
    check_budget([PROBLEM], student, WordMeter(), tight)
    with pytest.raises(ValueError, match=r"toy/chemistry/train/7 alone takes 141 tokens; got 60"):
        check_budget([PROBLEM, long], student, WordMeter(), tight)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": ("siblings",)}, r"unknown source 'siblings'; did you mean sibling\? known: "),
        ({"sources": ("sibling", "sibling")}, r"sources: must name each source once"),
        ({"top_k": 0}, r"top_k: must be at least 1; got 0"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TeacherConfig(**values)


def test_layout_system_leaves_every_turn_after_the_system_turn_as_the_student_reads_it():
    pairs = group([True, False])
    config = dataclasses.replace(SDPO, layout="system")
    _, wrong = build_teacher_prompts(
        pairs, PROBLEM, Recalled(), STUDENT, WordMeter(), config, seed=0
    )
    system, *rest = wrong.messages
    assert tuple(rest) == STUDENT[1:]
    assert system["content"] == "Answer with a letter.\n\nCorrect solution:\n\nsolution 0"
    [_, bare] = build_teacher_prompts(
        pairs, PROBLEM, Recalled(), STUDENT[1:], WordMeter(), config, seed=0
    )
    assert bare.messages[0] == {"role": "system", "content": "Correct solution:\n\nsolution 0"}
