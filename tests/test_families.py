"""config.json of models that people use, in the spellings of transformers 4 and 5."""

import json
import math

import pytest

from pmd_jax.policy.families import read_config, weight_table
from pmd_jax.policy.model import stacked_shape
from pmd_jax.policy.rope import Rope

QWEN3_8B = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
OLMO3_7B = {
    "model_type": "olmo3",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 65536,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "rope_theta": 500000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 100278,
}
LLAMA_31_8B = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
GEMMA3_270M = {
    "model_type": "gemma3_text",
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "vocab_size": 262144,
}


@pytest.fixture
def read(tmp_path):
    def read(values):
        (tmp_path / "config.json").write_text(json.dumps(values))
        return read_config(tmp_path)

    return read


def size(config) -> float:
    """Parameters, in billions."""
    return sum(math.prod(stacked_shape(w, config)) for w in weight_table(config)) / 1e9


@pytest.mark.parametrize(
    ("values", "billions"),
    [(QWEN3_8B, 8.191), (OLMO3_7B, 7.298), (LLAMA_31_8B, 8.030), (GEMMA3_270M, 0.268)],
)
def test_published_models_have_their_published_sizes(read, values, billions):
    assert size(read(values)) == pytest.approx(billions, abs=0.001)


def test_qwen3_and_its_stretched_context(read):
    assert read(QWEN3_8B).rope == Rope(1e6)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read(QWEN3_8B | {"rope_scaling": yarn})
    assert config.rope.kind == "yarn" and config.max_positions == 131072
    newer = dict(QWEN3_8B, rope_parameters={**yarn, "rope_theta": 5e6})
    del newer["rope_scaling"], newer["rope_theta"]
    assert read(newer).rope.theta == 5e6 and read(newer).rope.factor == 4.0


def test_olmo3_slides_on_three_of_four_layers_and_stretches_the_fourth(read):
    config = read(OLMO3_7B)
    assert config.sliding == (True, True, True, False) * 8 and config.window == 4096
    assert config.rope.kind == "yarn" and config.sliding_rope == Rope(500_000.0)
    assert (config.norms, config.qk_norm) == ("after", "projection")


def test_llama_3_scales_its_frequencies(read):
    assert read(LLAMA_31_8B).rope == Rope(500_000.0, "llama3", 8.0, 8192, 1.0, 4.0)


def test_gemma_has_two_bases_and_a_tied_head_by_default(read):
    config = read(GEMMA3_270M)
    assert config.sliding == ((True,) * 5 + (False,)) * 3 and config.tied_head
    assert (config.rope, config.sliding_rope) == (Rope(1e6), Rope(1e4))
    assert config.query_scale == 1 / 16 and config.embed_scale == 640**0.5
    nested = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 9e3},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
    }
    newer = read(GEMMA3_270M | {"rope_parameters": nested})
    assert (newer.rope, newer.sliding_rope) == (Rope(2e6, "linear", 8.0), Rope(9e3))
    with pytest.raises(ValueError, match="rope_parameters that are not given per layer type"):
        read(GEMMA3_270M | {"rope_parameters": {"rope_type": "default", "rope_theta": 2e6}})
    with pytest.raises(ValueError, match="must hold a JSON object; got list"):
        read([])
