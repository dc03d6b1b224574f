"""Our numbers are those of transformers (torch, float32): logits, weights there and back, chats.

Needs requirements-parity.txt and is run with `python -m pytest -m parity`. Models are tiny and
random here, all parameters drawn wide so that norms, windows and rotary scaling show in the logits.
"""

import jax
import numpy as np
import pytest

from pmd_jax.policy import model
from pmd_jax.policy.families import read_config
from pmd_jax.policy.policy import load_policy
from pmd_jax.policy.sharding import single_device_mesh
from pmd_jax.policy.weights import load_params, save_params

pytestmark = pytest.mark.parity

F32 = np.dtype("float32")
COMMON = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
NESTED = {
    "full_attention": {**YARN, "rope_theta": 500_000.0, "attention_factor": 1.2},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500_000.0},
}
CASES = {
    "llama": {"num_hidden_layers": 2, "rope_theta": 1e5},
    "llama_untied_llama3": {
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
        "rope_parameters": {**LLAMA3, "rope_theta": 5e5},
    },
    "llama_linear": {
        "num_hidden_layers": 2,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    },
    "qwen3": {"num_hidden_layers": 2, "rope_theta": 5e6, "tie_word_embeddings": True},
    "qwen3_yarn": {
        "num_hidden_layers": 2,
        "rope_parameters": {**YARN, "rope_theta": 1e6},
        "tie_word_embeddings": False,
    },
    "olmo3": {"num_hidden_layers": 4, "sliding_window": 9, "rope_parameters": NESTED},
    "olmo3_many_heads": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "sliding_window": 9,
        "rope_theta": 500_000.0,
    },
    "gemma3_text": {"num_hidden_layers": 6, "sliding_window": 9, "query_pre_attn_scalar": 16},
    "gemma3_text_scaled": {
        "num_hidden_layers": 7,
        "num_key_value_heads": 1,
        "sliding_window": 5,
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}
FAMILIES = ("llama", "qwen3", "olmo3", "gemma3_text")


def hf_model(case, **changes):
    """A random model of transformers, every parameter drawn anew and wide."""
    import torch
    import transformers

    family = next(f for f in FAMILIES if case.startswith(f))
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    values = {**COMMON, **ids, **CASES[case], **changes}
    config = transformers.AutoConfig.for_model(family, attn_implementation="eager", **values)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return theirs


def ours(folder):
    config = read_config(folder)
    return config, load_params(folder, config, single_device_mesh(), F32)


def our_logits(config, params, tokens):
    tokens = jax.numpy.asarray(tokens, jax.numpy.int32)
    hidden = model.causal_hidden(params, tokens, config, F32)
    return np.asarray(model.logits(model.head_of(params), hidden))


def their_logits(theirs, tokens, mask=None):
    import torch

    with torch.no_grad():
        return theirs(torch.tensor(tokens), attention_mask=mask).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
    """Beyond every window and beyond the context before YaRN, right-padded rows among them."""
    import torch

    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path / "hf")
    config, params = ours(tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(3, 160, (3, 60))
    lengths = (60, 41, 7)
    mask = torch.zeros(3, 60, dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens[row, length:] = 0
        mask[row, :length] = 1
    got, expected = our_logits(config, params, tokens), their_logits(theirs, tokens, mask)
    assert np.abs(expected).max() > 1
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(got[row, :length], expected[row, :length], atol=1e-4)


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["gqa1", "gqa2", "gqa4"])
@pytest.mark.parametrize("case", FAMILIES)
def test_shared_key_value_heads(case, kv_heads, tmp_path):
    theirs = hf_model(case, num_key_value_heads=kv_heads)
    theirs.save_pretrained(tmp_path / "hf")
    config, params = ours(tmp_path / "hf")
    assert config.num_kv_heads == kv_heads
    tokens = np.random.default_rng(1).integers(3, 160, (1, 24))
    np.testing.assert_allclose(
        our_logits(config, params, tokens), their_logits(theirs, tokens), atol=1e-4
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_bit_equal_and_loads_without_a_warning(case, dtype, tmp_path):
    import torch
    import transformers
    from safetensors.torch import load_file

    theirs = hf_model(case).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "hf")
    config = read_config(tmp_path / "hf")
    params = load_params(tmp_path / "hf", config, single_device_mesh(), jax.numpy.dtype(dtype))
    save_params(tmp_path / "back", params, config, tmp_path / "hf", dtype)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("hf", "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(info.values()), info
    assert again.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("case", FAMILIES)
def test_greedy_sampling_writes_what_transformers_writes(case, tmp_path):
    """Through the ring cache, past the windows, from prompts shorter and longer than them."""
    import torch
    from toys import write_tokenizer

    theirs = hf_model(case, vocab_size=264)
    theirs.save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    policy = load_policy(tmp_path / "hf", dtype="float32")
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 264, n).tolist() for n in (3, 20)]
    samples = policy.generate(prompts, max_new_tokens=24, temperature=0, stop_tokens=[])
    for prompt, [sample] in zip(prompts, samples, strict=True):
        row = torch.tensor([prompt])
        for token in sample.tokens:
            with torch.no_grad():
                assert theirs(row).logits[0, -1].argmax() == token
            row = torch.cat([row, torch.tensor([[int(token)]])], dim=1)


def test_embeddings_are_those_of_transformers(tmp_path):
    """Last token, normalised; saved without head and prefix, as Qwen3-Embedding is."""
    import torch
    from toys import write_tokenizer

    from pmd_jax.policy.embedder import Embedder

    theirs = hf_model("qwen3", vocab_size=264).model
    theirs.save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    embedder = Embedder.load(tmp_path / "hf")
    texts = ["Which gas law relates pressure and volume?", "pH", "behavior: check the unit"]
    for text, row in zip(texts, embedder.embed(texts), strict=True):
        with torch.no_grad():
            last = theirs(torch.tensor([embedder.tokens(text)])).last_hidden_state[0, -1]
        np.testing.assert_allclose(row, (last / last.norm()).numpy(), atol=1e-5)


def test_the_check_tells_equal_from_different(tmp_path, capsys):
    import torch
    from toys import write_tokenizer

    from tools import convert_hf

    theirs = hf_model("qwen3", vocab_size=264, max_position_embeddings=512)
    theirs.save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    assert convert_hf.main(["check", str(tmp_path / "hf")]) == 0
    assert capsys.readouterr().out.startswith("equal: largest difference of logits")
    with torch.no_grad():
        theirs.model.norm.weight.mul_(1.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_hf, "their_model", lambda files: theirs)
        assert convert_hf.main(["check", str(tmp_path / "hf")]) == 1
    assert "DIFFERENT" in capsys.readouterr().out
