"""What is sampled depends on seed, request and sample alone; its log-probabilities are exact."""

import jax.numpy as jnp
import numpy as np
import pytest
from toys import VARIANTS, eight_devices, full_logprobs, make_sampler, params_on, toy_params

from pmd_jax.policy.sampler import SamplingConfig, bucket
from pmd_jax.policy.selection import truncate

STOP = 5
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(6, 96, n).tolist() for n in (3, 17, 8, 70, 5)]
LIMITS = [RNG.integers(1, 40, 4).tolist() for _ in PROMPTS]


def generate(order=range(5), sampling=None, seed=7, stop=(STOP,), **engine):
    """{prompt: samples}, whatever the order in which the prompts were asked."""
    sampler, weights = make_sampler(**engine)
    order = list(order)
    out = sampler.generate(
        weights,
        [PROMPTS[i] for i in order],
        [LIMITS[i] for i in order],
        sampling or SamplingConfig(),
        list(stop),
        seed,
        order,
    )
    return dict(zip(order, out, strict=True)), sampler.stats


def flat(samples):
    return [sample.tokens.tolist() for i in sorted(samples) for sample in samples[i]]


@pytest.fixture(scope="module")
def reference():
    return generate()[0]


@pytest.mark.parametrize(
    ("order", "max_rows", "chunk"),
    [([4, 2, 0, 1, 3], 3, 5), (range(5), 1, 16), ([3], 64, 7), ([1, 0], 8, 1)],
)
def test_slots_order_neighbours_and_chunks_change_nothing(reference, order, max_rows, chunk):
    other, _ = generate(order, max_rows=max_rows, chunk=chunk)
    assert flat(other) == flat({i: reference[i] for i in order})


def test_eight_devices_sample_what_one_does(reference):
    mesh = eight_devices()
    other, _ = generate(mesh=mesh, max_rows=16, params=params_on(mesh))
    assert flat(other) == flat(reference)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: c.family)
def test_logprobs_equal_those_of_a_full_forward_pass(config):
    """Rows refilled and rings wrapped many times, in prompts longer and shorter than a window."""
    samples, _ = generate(config=config, max_rows=3, stop=())
    for i, group in samples.items():
        for sample in group:
            row = [*PROMPTS[i], *sample.tokens]
            at = np.arange(len(PROMPTS[i]), len(row))
            expected = full_logprobs(toy_params(0, config), row, config)[at - 1, sample.tokens]
            np.testing.assert_allclose(sample.logprobs, expected, atol=2e-5)


def test_every_sample_ends_at_its_stop_token_or_at_its_own_limit(reference):
    for i, samples in reference.items():
        for sample, limit in zip(samples, LIMITS[i], strict=True):
            if sample.stop == "stop":
                assert sample.tokens[-1] == STOP and STOP not in sample.tokens[:-1]
            else:
                assert len(sample.tokens) == limit and STOP not in sample.tokens
    assert {s.stop for samples in reference.values() for s in samples} == {"stop", "length"}


def test_without_stop_tokens_every_sample_runs_to_its_limit():
    samples, stats = generate(stop=())
    assert [len(tokens) for tokens in flat(samples)] == [n for limit in LIMITS for n in limit]
    assert stats.response_tokens == sum(map(sum, LIMITS))


def test_temperature_zero_is_the_argmax_and_one_kept_token_too():
    greedy, _ = generate([0], sampling=SamplingConfig(temperature=0))
    logprobs = full_logprobs(toy_params(), [*PROMPTS[0], *greedy[0][0].tokens])
    start = len(PROMPTS[0]) - 1
    assert greedy[0][0].tokens.tolist() == logprobs.argmax(-1)[start:-1].tolist()
    for sampling in (SamplingConfig(top_k=1), SamplingConfig(top_p=1e-4)):
        assert flat(generate([0], sampling=sampling)[0]) == flat(greedy)


def test_another_seed_another_sample_other_tokens(reference):
    assert flat(generate(seed=8)[0]) != flat(reference)
    assert reference[1][0].tokens.tolist()[:3] != reference[1][1].tokens.tolist()[:3]


def kept(logits, top_k=0, top_p=1.0):
    cuts = SamplingConfig(top_k=top_k, top_p=top_p).cuts
    cut = truncate(jnp.asarray([logits]), jnp.int32(top_k), jnp.float32(top_p), cuts)
    return np.flatnonzero(np.asarray(cut)[0] > -1e29).tolist()


def test_top_k_and_top_p_keep_the_right_tokens():
    logits = np.log([0.1, 0.4, 0.3, 0.2])
    assert kept(logits) == [0, 1, 2, 3]
    assert kept(logits, top_k=2) == [1, 2]
    assert kept(logits, top_p=0.4) == [1]  # 0.4 is reached by the first alone
    assert kept(logits, top_p=0.65) == [1, 2]
    assert kept(logits, top_p=0.95) == [0, 1, 2, 3]
    # Hugging Face's order: top-p counts what top-k left, 0.4 / 0.7 = 0.57 of it.
    assert kept(logits, top_k=2, top_p=0.55) == [1]
    assert kept(logits, top_k=9) == [0, 1, 2, 3]


def test_sampled_frequencies_are_those_of_the_softmax():
    """4,000 first tokens against their probabilities: within four standard errors."""
    sampler, weights = make_sampler(max_rows=512)
    [samples] = sampler.generate(weights, [PROMPTS[0]], [[1] * 4000], SamplingConfig(), [], 0)
    counts = np.bincount([int(s.tokens[0]) for s in samples], minlength=96) / 4000
    probs = np.exp(full_logprobs(toy_params(), PROMPTS[0])[-1])
    assert (np.abs(counts - probs) < 4 * np.sqrt(probs / 4000) + 1e-3).all()


def test_a_prompt_is_prefilled_once_for_its_group():
    _, stats = generate(max_rows=2)  # fewer rows than samples: rows are refilled
    assert stats.prompt_tokens == sum(map(len, PROMPTS))


@pytest.mark.parametrize(
    ("prompts", "limits", "message"),
    [
        ([[]], [[4]], r"prompts\[0\]: must hold at least one token"),
        ([[1]], [[0]], r"max_new_tokens: must be at least 1"),
        ([[1] * 250], [[7]], r"prompts\[0\]: .* 256 positions; got 250 \+ 7"),
    ],
)
def test_bad_requests_are_refused_before_any_work(prompts, limits, message):
    sampler, weights = make_sampler()
    with pytest.raises(ValueError, match=message):
        sampler.generate(weights, prompts, limits, SamplingConfig(), [], 0)


def test_buckets_are_few_and_large_enough():
    assert [bucket(n, 64) for n in (1, 64, 65, 286, 600)] == [64, 64, 128, 320, 640]
    assert len({bucket(n, 16) for n in range(1, 8193)}) < 40
    assert all(n <= bucket(n, 16) <= max(16 * -(-n // 16), 1.25 * n) for n in range(1, 8193))
