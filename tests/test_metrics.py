"""Scores over samples, on cases small enough to work by hand."""

import itertools

import numpy as np
import pytest

from pmd_jax import metrics

# Two questions, four samples: one correct of four, three correct of four.
CORRECT = np.array([[True, False, False, False], [True, True, False, True]])


def test_avg_at_k_is_the_share_of_correct_samples():
    assert metrics.avg_at_k(CORRECT).tolist() == [0.25, 0.75]


def test_pass_at_k_by_hand():
    # One correct of four: of the 6 pairs, 3 hold it. Three correct of four: every pair holds one.
    assert metrics.pass_at_k(CORRECT, 2).tolist() == [0.5, 1.0]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_pass_at_k_equals_the_count_over_all_subsets(k):
    row = np.array([False, True, False, False, True])
    subsets = list(itertools.combinations(row, k))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    assert metrics.pass_at_k(row[None], k)[0] == pytest.approx(expected)


def test_pass_at_1_is_avg_at_k_and_pass_at_all_is_best_at_k():
    correct = np.random.default_rng(0).random((50, 16)) < 0.2
    np.testing.assert_allclose(metrics.pass_at_k(correct, 1), metrics.avg_at_k(correct))
    np.testing.assert_allclose(metrics.pass_at_k(correct, 16), metrics.best_at_k(correct))


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_refuses_a_k_it_has_no_samples_for(k):
    with pytest.raises(ValueError, match=f"k: must be between 1 and the 4 samples given; got {k}"):
        metrics.pass_at_k(CORRECT, k)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["A", "A", "B", "C"], 1.0),  # a clear majority
        (["B", "B", "A", "C"], 0.0),  # a clear majority for a wrong answer
        (["A", "A", "B", "B"], 0.5),  # a tie of two
        (["A", "B", "C"], 1 / 3),  # a tie of three
        (["B", "C"], 0.0),  # a tie of two wrong answers
        (["", "", "", "A"], 1.0),  # no answer is no vote
        (["", "", ""], 0.0),  # nobody voted
        ([], 0.0),
    ],
)
def test_majority_at_k_by_hand(answers, expected):
    assert metrics.majority_at_k([answers], ["A"])[0] == pytest.approx(expected)


def test_majority_does_not_depend_on_the_order_of_samples():
    scores = {
        metrics.majority_at_k([list(order)], ["A"])[0]
        for order in itertools.permutations(["A", "B", "A", "B", "C", ""])
    }
    assert scores == {0.5}


def test_majority_refuses_what_it_cannot_score():
    with pytest.raises(ValueError, match="one row per gold answer; got 1 and 2"):
        metrics.majority_at_k([["A"]], ["A", "B"])
    with pytest.raises(ValueError, match='gold: must not be ""; got "" for question 1'):
        metrics.majority_at_k([["A"], ["B"]], ["A", ""])


def test_best_at_k_asks_for_one_correct_sample():
    correct = np.array([[False, False], [False, True], [True, True]])
    assert metrics.best_at_k(correct).tolist() == [0.0, 1.0, 1.0]


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="at least one sample per question"):
        metrics.avg_at_k(np.zeros((3, 0), bool))


def test_bootstrap_interval_is_that_of_the_normal_approximation():
    # 400 questions, half of them solved: the standard error is 0.5 / sqrt(400) = 0.025.
    scores = np.repeat([0.0, 1.0], 200)
    low, high = metrics.bootstrap_interval(scores, num_resamples=10_000)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.004)


def test_bootstrap_interval_narrows_with_the_level_and_repeats_with_the_seed():
    scores = np.linspace(0.0, 1.0, 60)
    wide, narrow = (metrics.bootstrap_interval(scores, level=level) for level in (0.95, 0.5))
    assert wide[0] < narrow[0] < scores.mean() < narrow[1] < wide[1]
    assert metrics.bootstrap_interval(scores) == wide
    assert metrics.bootstrap_interval(scores, seed=1) != wide


def test_equal_scores_have_an_interval_of_no_width():
    assert metrics.bootstrap_interval(np.full(10, 0.25)) == (0.25, 0.25)


def test_paired_bootstrap_sees_through_the_difficulty_of_questions():
    # Questions differ wildly, the two policies by 0.05 on every one: only pairing shows it.
    difficulty = np.linspace(0.0, 0.9, 40)
    difference, low, high, p = metrics.paired_bootstrap(difficulty + 0.05, difficulty)
    assert (difference, low, high) == pytest.approx((0.05, 0.05, 0.05))
    assert p == pytest.approx(2 / 2001)
    before, after = (metrics.bootstrap_interval(difficulty + shift) for shift in (0.0, 0.05))
    assert before[1] > after[0]


def test_paired_bootstrap_is_antisymmetric_in_sign_and_finds_nothing_in_noise():
    a, b = np.random.default_rng(3).random((2, 200))
    difference, low, high, p = metrics.paired_bootstrap(a, b)
    swapped = metrics.paired_bootstrap(b, a)
    assert swapped == pytest.approx((-difference, -high, -low, p))
    assert low < 0 < high
    assert p > 0.05
    assert metrics.paired_bootstrap(a, a) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("scores", [np.array([]), np.array([0.5, np.nan])])
def test_intervals_need_finite_scores(scores):
    with pytest.raises(ValueError, match="scores: must be one finite number per question"):
        metrics.bootstrap_interval(scores)


def test_intervals_refuse_a_bad_level_and_unpaired_scores():
    with pytest.raises(ValueError, match="level: must be between 0 and 1; got 95"):
        metrics.bootstrap_interval(np.ones(3), level=95.0)
    with pytest.raises(ValueError, match="num_resamples: must be at least 1; got 0"):
        metrics.bootstrap_interval(np.ones(3), num_resamples=0)
    with pytest.raises(ValueError, match="must score the same questions; got 3 and 2"):
        metrics.paired_bootstrap(np.ones(3), np.ones(2))


def test_concepts_are_counted_by_their_stems():
    texts = ["My strategy: lessons.", "nothing", "Behaviour and behaviors", "misbehaving"]
    found = metrics.concept_frequency(texts, num_tokens=500)
    assert found == {"concepts/share": 0.5, "concepts/per_1000_tokens": 8.0}
    assert metrics.concept_frequency([], 0) == {"concepts/share": 0, "concepts/per_1000_tokens": 0}


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("row", ["AABBC.", "AAABB.", "BBCCDD", "A.....", "ABCDAB"])
def test_majority_of_fewer_samples_equals_the_mean_over_all_subsets(row, k):
    """ "." is a response without an answer."""
    answers = [letter.strip(".") for letter in row]
    subsets = list(itertools.combinations(answers, k))
    expected = np.mean([metrics.majority_at_k([subset], ["A"])[0] for subset in subsets])
    assert metrics.majority_at_k([answers], ["A"], k)[0] == pytest.approx(expected)


def test_majority_of_many_samples_is_exact_and_finite():
    answers = ["A"] * 32 + ["B"] * 31 + [""]
    assert metrics.majority_at_k([answers], ["A"])[0] == 1.0
    assert metrics.majority_at_k([answers], ["A"], 1)[0] == pytest.approx(0.5)
    assert 0.5 < metrics.majority_at_k([answers], ["A"], 16)[0] < 0.6


def test_majority_of_more_samples_than_there_are_is_refused():
    with pytest.raises(ValueError, match="k: must be between 1 and the 2 samples given; got 3"):
        metrics.majority_at_k([["A", "B"]], ["A"], 3)


def test_a_curve_doubles_up_to_all_samples():
    assert metrics.curve(1) == (1,)
    assert metrics.curve(8) == (1, 2, 4, 8)
    assert metrics.curve(12) == (1, 2, 4, 8, 12)


def draws(rng, shift=0.0, num_questions=80, num_samples=4):
    """avg@4 of questions of all difficulties, and the mean that it estimates."""
    ability = np.clip(rng.beta(0.7, 1.3, num_questions) + shift, 0, 1)
    return rng.binomial(num_samples, ability) / num_samples, ability


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_cover_at_their_nominal_rate(level):
    rng, truth, trials = np.random.default_rng(0), 0.7 / 2.0, 600
    inside = 0
    for trial in range(trials):
        low, high = metrics.bootstrap_interval(draws(rng)[0], level, trial, 400)
        inside += low <= truth <= high
    margin = 3 * np.sqrt(level * (1 - level) / trials)
    assert abs(inside / trials - level) < margin


def test_paired_intervals_cover_and_p_values_are_uniform_where_nothing_differs():
    rng, trials = np.random.default_rng(1), 600
    inside, small = 0, 0
    for trial in range(trials):
        _, ability = draws(rng)
        a, b = (rng.binomial(4, ability) / 4 for _ in range(2))
        _, low, high, p = metrics.paired_bootstrap(a, b, seed=trial, num_resamples=400)
        inside += low <= 0 <= high
        small += p <= 0.05
    margin = 3 * np.sqrt(0.95 * 0.05 / trials)
    assert abs(inside / trials - 0.95) < margin
    assert abs(small / trials - 0.05) < margin


def test_solved_sets_part_questions_by_who_solves_them():
    a, b = {"p": 0.25, "q": 0.75, "r": 0.0}, {"p": 1.0, "q": 0.0, "r": 0.0}
    assert metrics.solved_sets(a, b, 0.0) == (["p"], ["q"], [], ["r"])
    assert metrics.solved_sets(a, b, 0.5) == ([], ["q"], ["p"], ["r"])
    with pytest.raises(ValueError, match="must score the same questions; 1 are in one alone"):
        metrics.solved_sets(a, {"p": 1.0, "q": 0.0}, 0.0)
