"""Rotary frequencies by hand, and what config.json says of them in two spellings."""

import numpy as np
import pytest

from pmd_jax.policy.rope import Rope, frequencies, read_rope


def test_plain_frequencies_by_hand():
    np.testing.assert_allclose(frequencies(Rope(100.0), 4), [1.0, 0.1], rtol=1e-6)
    np.testing.assert_allclose(frequencies(Rope(100.0, "linear", 4.0), 4), [0.25, 0.025], rtol=1e-6)


def test_llama3_keeps_what_turns_fast_divides_what_turns_slowly_and_ramps_between():
    """Over 64 original positions: wavelengths below 16 are kept, above 64 divided by 8."""
    rope = Rope(10_000.0, "llama3", 8.0, original_positions=64)
    plain, scaled = frequencies(Rope(10_000.0), 16), frequencies(rope, 16)
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(scaled[wavelength < 16], plain[wavelength < 16])
    np.testing.assert_allclose(scaled[wavelength > 64], plain[wavelength > 64] / 8)
    between = (wavelength >= 16) & (wavelength <= 64)
    assert between.any()
    share = (64 / wavelength[between] - 1) / 3
    expected = ((1 - share) / 8 + share) * plain[between]
    np.testing.assert_allclose(scaled[between], expected, rtol=1e-5)


def test_yarn_keeps_the_first_pairs_and_stretches_the_last():
    rope = Rope(10_000.0, "yarn", 4.0, original_positions=128)
    plain, scaled = frequencies(Rope(10_000.0), 32), frequencies(rope, 32)
    ratio = plain / scaled
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(4)
    assert (np.diff(ratio) >= -1e-6).all()


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({}, Rope(7.0)),
        ({"rope_type": "default", "rope_theta": 5e6}, Rope(5e6)),
        ({"type": "linear", "factor": 2}, Rope(7.0, "linear", 2.0)),
        (  # transformers 4 leaves the context before scaling to max_position_embeddings
            {"type": "yarn", "factor": 4.0, "attention_factor": 1.5},
            Rope(7.0, "yarn", 4.0, 100, attention_factor=1.5),
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            Rope(7.0, "yarn", 4.0, 32, attention_factor=0.1 * np.log(4.0) + 1),
        ),
        (
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4},
            Rope(7.0, "llama3", 8.0, 100, 1.0, 4.0),
        ),
    ],
)
def test_entries_of_config_json(entry, expected):
    assert read_rope(entry, 7.0, 100) == expected


def test_what_is_not_implemented_is_named():
    with pytest.raises(ValueError, match="rope type 'dynamic'"):
        read_rope({"rope_type": "dynamic"}, 1e4, 100)
    with pytest.raises(ValueError, match=r"partial_rotary_factor 0\.25"):
        read_rope({"partial_rotary_factor": 0.25}, 1e4, 100)
