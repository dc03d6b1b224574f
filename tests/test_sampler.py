"""What is sampled depends on seed, request and sample alone; its log-probabilities are exact."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import (
    CONFIG,
    F32,
    VARIANTS,
    eight_devices,
    full_logprobs,
    make_sampler,
    params_on,
    toy_params,
)

from pmd_jax.policy import cache, programs
from pmd_jax.policy.sampler import SamplingConfig, _Run, bucket
from pmd_jax.policy.scheduler import Scheduler, Shape
from pmd_jax.policy.selection import Cuts, num_blocks, truncate
from pmd_jax.telemetry import Compilations

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
    ("order", "engine"),
    [
        ([4, 2, 0, 1, 3], {"max_rows": 3, "chunk": 5}),
        (range(5), {"max_rows": 1}),
        ([3], {"chunk": 7, "prefill_tokens": 1}),
        ([1, 0], {"max_rows": 8, "chunk": 1}),
        # The ring grows twice, and the rows are moved into smaller tables down to one.
        (range(5), {"max_rows": 16, "chunk": 4, "min_columns": 8, "min_rows": 1}),
    ],
)
def test_rows_order_neighbours_and_chunks_change_nothing(reference, order, engine):
    other, _ = generate(order, **engine)
    assert flat(other) == flat({i: reference[i] for i in order})


def test_keys_in_one_block_are_those_in_many(reference, monkeypatch):
    keys = jnp.arange(12).reshape(6, 2)  # six columns of two
    assert cache.in_blocks(keys, 3).tolist() == [[[0, 2, 4], [1, 3, 5]], [[6, 8, 10], [7, 9, 11]]]
    assert (cache.in_line(cache.in_blocks(keys, 3)) == keys).all()
    monkeypatch.setattr(cache, "block_width", lambda columns, mesh: columns)  # as on a TPU or GPU
    assert flat(generate(min_columns=8)[0]) == flat(reference)


def test_what_is_expected_changes_the_order_of_work_and_nothing_else(reference):
    sampler, weights = make_sampler(max_rows=4)
    expected = [[40 - n for n in limits] for limits in LIMITS]
    out = sampler.generate(weights, PROMPTS, LIMITS, SamplingConfig(), [STOP], 7, expected=expected)
    assert flat(dict(enumerate(out))) == flat(reference)


def test_few_row_steps_are_idle():
    """16 responses of 3 to 39 tokens in 8 rows: a free row is seated at once, the longest first."""
    _, stats = generate(range(4), stop=(), max_rows=8, chunk=16)
    assert stats.slots < 1.25 * stats.response_tokens


def test_the_second_run_of_like_lengths_compiles_nothing():
    sampler, weights = make_sampler(max_rows=4, min_columns=8, min_rows=1)

    def run(seed):
        sampler.generate(weights, PROMPTS, LIMITS, SamplingConfig(), [], seed)

    run(0)
    compiled = Compilations()
    run(1)
    assert compiled.count == 0
    sampler.generate(weights, [[1] * 100], [[8]], SamplingConfig(), [], 0)  # a longer prompt
    assert compiled.count > 0


def test_ids_beyond_the_tokenizer_s_are_never_drawn():
    """The policy's own log-probabilities still count them, as the trainer's do."""
    sampler, weights = make_sampler(num_tokens=40)
    [samples] = sampler.generate(weights, [PROMPTS[0]], [[8] * 16], SamplingConfig(), [], 0)
    assert max(int(s.tokens.max()) for s in samples) < 40
    row = [*PROMPTS[0], *samples[0].tokens]
    expected = full_logprobs(toy_params(), row)[np.arange(2, len(row) - 1), samples[0].tokens]
    np.testing.assert_allclose(samples[0].logprobs, expected, atol=2e-5)
    assert (samples[0].sampling_logprobs > samples[0].logprobs).all()


@pytest.mark.parametrize(
    "sampling", [SamplingConfig(), SamplingConfig(0.7), SamplingConfig(0.9, top_p=0.6, top_k=20)]
)
def test_sampling_logprobs_are_those_of_the_distribution_drawn_from(sampling):
    [sample] = generate([0], sampling=sampling, stop=())[0][0][:1]
    row = [*PROMPTS[0], *sample.tokens]
    logprobs = full_logprobs(toy_params(), row)[len(PROMPTS[0]) - 1 : -1]
    cut = truncate(
        jnp.asarray(logprobs / sampling.temperature),
        jnp.int32(sampling.top_k),
        jnp.float32(sampling.top_p),
        sampling.cuts,
    )
    expected = np.asarray(jax.nn.log_softmax(cut))[np.arange(len(cut)), sample.tokens]
    np.testing.assert_allclose(sample.sampling_logprobs, expected, atol=3e-5)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: c.family)
def test_an_int8_cache_is_close_but_not_the_same(config):
    samples, _ = generate(config=config, max_rows=3, stop=(), kv_cache="int8")
    gaps = []
    for i, group in samples.items():
        for sample in group:
            row = [*PROMPTS[i], *sample.tokens]
            at = np.arange(len(PROMPTS[i]), len(row))
            expected = full_logprobs(toy_params(0, config), row, config)[at - 1, sample.tokens]
            gaps += np.abs(sample.logprobs - expected).tolist()
    assert 1e-4 < np.mean(gaps) < 0.05


def test_the_logits_of_a_sharded_vocabulary_do_not_travel():
    """Of the compiled decode step on 8 devices: no collective holds a row's whole vocabulary."""
    mesh = eight_devices()
    _, weights = make_sampler(mesh=mesh, params=params_on(mesh))
    shape = Shape(4, 2, 4, 2)
    state = cache.empty_state(CONFIG, shape, 64, 32, mesh, F32)
    rows = _Run.idle_rows(shape) | dict(
        zip(("members", "place"), Scheduler([[1]], shape).tables(), strict=True)
    )
    sampling = {"temperature": jnp.float32(1), "top_k": jnp.int32(9), "top_p": jnp.float32(0.9)}
    with jax.set_mesh(mesh):
        text = (
            programs.decode.lower(
                weights.top,
                weights.layers,
                state,
                rows,
                np.int32(4),
                sampling,
                jnp.zeros(8, jnp.int32),
                config=CONFIG,
                dtype=F32,
                chunk=16,
                cuts=Cuts(True, True),
                num_tokens=90,
                turned=weights.turned,
            )
            .compile()
            .as_text()
        )
    sent = re.findall(r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute)", text)
    sizes = [int(n) for shapes in sent for n in re.findall(r"(?<=[\[,])\d+(?=[\],])", shapes)]
    assert sent and max(sizes) < CONFIG.vocab_size // 2  # a shard's own part is 48


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


def test_a_vocabulary_is_cut_into_equal_blocks_near_its_root():
    sizes = (96, 264, 49_152, 100_278, 128_256, 151_936, 262_144)
    assert [num_blocks(n) for n in sizes] == [8, 8, 256, 162, 256, 128, 512]
    assert all(n % num_blocks(n) == 0 for n in range(1, 300))
