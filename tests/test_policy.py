"""The policy object, and weights in and out of a Hugging Face folder."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toys import (
    TEXT_CONFIG,
    eight_devices,
    full_logprobs,
    toy_params,
    toy_tensors,
    write_model_folder,
)

from pmd_jax import load_policy
from pmd_jax.policy import model
from pmd_jax.policy.families import read_config, weight_table
from pmd_jax.policy.weights import INDEX, load_params

CHAT = [{"role": "user", "content": "What is a mole?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model_folder(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy(folder, dtype="float32")


def test_the_config_is_read_from_the_folder(folder):
    assert read_config(folder) == TEXT_CONFIG


def test_loaded_weights_are_those_of_the_file_on_any_mesh(folder):
    for mesh in (None, eight_devices()):
        loaded = load_policy(folder, dtype="float32", mesh=mesh)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, toy_params(0, TEXT_CONFIG))


def test_each_device_reads_only_its_own_part(folder):
    params = load_policy(folder, dtype="float32", mesh=eight_devices()).params
    up = params["layers"]["up"]
    assert {shard.data.nbytes for shard in up.addressable_shards} == {up.nbytes // 4}


def test_there_and_back_is_bit_equal(folder, policy, tmp_path):
    policy.save_hf(tmp_path / "saved", dtype="float32")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "saved"))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    again = load_policy(tmp_path / "saved", dtype="float32")
    assert again.tokenizer.encode_chat(CHAT) == policy.tokenizer.encode_chat(CHAT)


def test_bfloat16_is_written_and_named_in_the_config(policy, tmp_path):
    policy.save_hf(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (
        load_file(tmp_path / "half" / "model.safetensors")["model.norm.weight"].dtype.itemsize == 2
    )
    with pytest.raises(ValueError, match="must be empty or new"):
        policy.save_hf(tmp_path / "half")


GOLDEN = {  # last-token logits of transformers 5.23 (torch, float32) for `golden_params` and 1..20
    "tied": [-0.207269, 0.050862, -0.005632, -0.271474, -0.124384, 0.155406, 0.096052, 0.040351],
    "untied": [0.193274, 0.321818, -0.281282, 0.051947, 0.149914, -0.065713, -0.470458, -0.199954],
}


def golden_params(config):
    """Weights that numpy makes the same everywhere."""
    rng = np.random.default_rng(0)
    shapes = {w.path: model.stacked_shape(w, config) for w in weight_table(config)}
    return model.tree_of(
        {path: rng.normal(size=shape).astype(np.float32) * 0.2 for path, shape in shapes.items()}
    )


@pytest.mark.parametrize("head", GOLDEN)
def test_logits_match_transformers(head):
    config = dataclasses.replace(TEXT_CONFIG, tied_head=head == "tied")
    params = jax.tree.map(jnp.asarray, golden_params(config))
    hidden = model.causal_hidden(params, jnp.arange(1, 21)[None], config, jnp.dtype("float32"))
    logits = model.logits(model.head_of(params), hidden)[0]
    np.testing.assert_allclose(logits[-1, ::33], GOLDEN[head], atol=1e-4)


def test_logits_and_generation_agree(policy):
    prompt = policy.tokenizer.encode_chat(CHAT)
    [[sample]] = policy.generate([prompt], max_new_tokens=8, temperature=0, stop_tokens=[])
    row = [*prompt, *sample.tokens]
    logits = np.asarray(policy.logits(np.asarray([row])))[0]
    assert logits.dtype == np.float32 and logits.shape == (len(row), TEXT_CONFIG.vocab_size)
    assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == sample.tokens.tolist()
    expected = full_logprobs(policy.params, row, TEXT_CONFIG)
    got = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_generate_returns_prompts_by_samples(policy):
    prompts = [policy.tokenizer.encode_chat(CHAT), [1, 2, 3]]
    limits = [[1, 2, 3], [4, 5, 6]]
    out = policy.generate(prompts, num_samples=3, max_new_tokens=limits, stop_tokens=[])
    assert [[len(s.tokens) for s in samples] for samples in out] == limits
    assert all(s.logprobs.shape == s.tokens.shape and s.stop == "length" for r in out for s in r)


def test_the_models_own_stop_tokens_are_the_default(policy):
    """Of 64 samples of 40 tokens of a near-random model, some meet one of two stop tokens."""
    [samples] = policy.generate([[1, 2]], num_samples=64, max_new_tokens=40)
    ends = {int(s.tokens[-1]) for s in samples if s.stop == "stop"}
    assert ends and ends <= {256, 258}


def test_new_weights_are_used_at_once(folder):
    policy = load_policy(folder, dtype="float32")
    ask = dict(max_new_tokens=12, temperature=0.0, stop_tokens=[])
    [[before]] = policy.generate([[1, 2, 3]], **ask)
    policy.params = toy_params(5, TEXT_CONFIG)
    [[after]] = policy.generate([[1, 2, 3]], **ask)
    assert before.tokens.tolist() != after.tokens.tolist()


def broken(folder, change):
    """A copy of the toy's tensors after `change`, saved in place."""
    tensors = toy_tensors(TEXT_CONFIG)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks 1 tensors: \['model.norm.weight'\]"),
        (lambda t: t.update(extra=np.ones(2)), r"holds 1 tensors .*\['extra'\]"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)}),
            r"model.norm.weight must have shape \(32,\) by config.json; got \(31,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)}),
            "model.norm.weight must be one of F32, BF16, F16; got I8",
        ),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    folder = write_model_folder(tmp_path / "toy")
    broken(folder, change)
    with pytest.raises(ValueError, match=message):
        load_policy(folder, dtype="float32")


def test_a_head_of_its_own_is_read_and_written(tmp_path):
    untied = dataclasses.replace(TEXT_CONFIG, tied_head=False)
    folder = write_model_folder(tmp_path / "untied", untied)
    policy = load_policy(folder, dtype="float32")
    assert policy.params["head"].shape == (264, 32)
    policy.save_hf(tmp_path / "saved", dtype="float32")
    assert "lm_head.weight" in load_file(tmp_path / "saved" / "model.safetensors")


def test_weights_cut_over_several_files_are_found(tmp_path, policy, monkeypatch):
    monkeypatch.setattr("pmd_jax.policy.weights.SHARD_BYTES", 20_000)
    policy.save_hf(tmp_path / "cut", dtype="float32")
    assert len(list((tmp_path / "cut").glob("model-*-of-*.safetensors"))) > 2
    params = load_params(tmp_path / "cut", policy.config, policy.mesh, np.dtype("float32"))
    jax.tree.map(np.testing.assert_array_equal, params, policy.params)


@pytest.mark.parametrize("kept", [5, 200, -3])
def test_a_truncated_file_is_named_before_anything_is_read(tmp_path, kept):
    folder = write_model_folder(tmp_path / "toy")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged .*fetch it again"):
        load_policy(folder, dtype="float32")


def test_an_absent_shard_is_named(tmp_path, policy, monkeypatch):
    monkeypatch.setattr("pmd_jax.policy.weights.SHARD_BYTES", 20_000)
    policy.save_hf(tmp_path / "cut", dtype="float32")
    second = sorted((tmp_path / "cut").glob("model-*.safetensors"))[1]
    second.unlink()
    with pytest.raises(ValueError, match=f"lacks {second.name}, which {INDEX} names"):
        load_policy(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: damaged"):
        load_policy(tmp_path / "cut")


def test_a_save_that_fails_leaves_nothing(policy, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr("pmd_jax.policy.weights.copy_model_files", full_disk)
    with pytest.raises(OSError, match="no space left"):
        policy.save_hf(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_model_saved_without_its_head_lacks_a_prefix(tmp_path):
    """As embedding models are: "layers.0.…" where a policy has "model.layers.0.…"."""
    folder = write_model_folder(tmp_path / "toy")
    bare = {name.removeprefix("model."): t for name, t in toy_tensors(TEXT_CONFIG).items()}
    save_file(bare, folder / "model.safetensors")
    loaded = load_policy(folder, dtype="float32").params
    jax.tree.map(np.testing.assert_array_equal, loaded, toy_params(0, TEXT_CONFIG))


@pytest.mark.parametrize("piece", [1, 3000])
def test_reading_in_pieces_changes_nothing(folder, monkeypatch, piece):
    monkeypatch.setattr("pmd_jax.policy.weights.PIECE_BYTES", piece)
    loaded = load_policy(folder, dtype="float32", mesh=eight_devices())
    jax.tree.map(np.testing.assert_array_equal, loaded.params, toy_params(0, TEXT_CONFIG))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "must be one of gemma3_text, llama, olmo3, qwen3; got 'mamba'"),
        ({"rms_norm_eps": ...}, "lacks 'rms_norm_eps', which a llama model needs"),
        ({"mlp_bias": True}, "uses mlp_bias"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "uses rope type 'longrope'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "uses partial_rotary_factor 0.5"),
        ({"hidden_act": "relu"}, "uses activation 'relu'"),
        ({"quantization_config": {"bits": 4}}, "uses quantization_config"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "uses use_sliding_window"),
        ({"model_type": "olmo3", "layer_types": ["linear"]}, "uses layer type 'linear'"),
        ({"model_type": "olmo3", "layer_types": ["full_attention"]}, "must name each of 2 layers"),
        ({"model_type": "olmo3"}, "sliding_window must be at least 1"),
        (
            {"model_type": "gemma3_text", "final_logit_softcapping": 30.0},
            "uses final_logit_softcapping, which the gemma3 family",
        ),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple .* 4 and 3"),
    ],
)
def test_a_config_we_cannot_compute_is_refused_by_name(tmp_path, changes, message):
    file = write_model_folder(tmp_path / "toy") / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    with pytest.raises(ValueError, match=message):
        read_config(file.parent)


def test_a_config_that_is_half_written_is_named(tmp_path):
    file = write_model_folder(tmp_path / "toy") / "config.json"
    file.write_text(file.read_text()[:40])
    with pytest.raises(ValueError, match=r"config\.json: must be JSON"):
        read_config(file.parent)


def test_a_dtype_that_is_none_is_refused(folder):
    with pytest.raises(ValueError, match="dtype: must be one of bfloat16, float32; got 'int8'"):
        load_policy(folder, dtype="int8")


@pytest.mark.parametrize("param_dtype", [None, "float32"])
def test_bfloat16_computes_and_its_sampler_agrees_with_its_forward_pass(folder, param_dtype):
    policy = load_policy(folder, param_dtype=param_dtype)  # bfloat16 is the default
    assert policy.params["embed"].dtype == (param_dtype or "bfloat16")
    prompt = policy.tokenizer.encode_chat(CHAT)
    [[sample]] = policy.generate([prompt], max_new_tokens=16, stop_tokens=[])
    row = [*prompt, *sample.tokens]
    logprobs = np.asarray(jax.nn.log_softmax(policy.logits([row])))[0]
    at = np.arange(len(prompt), len(row))
    np.testing.assert_allclose(sample.logprobs, logprobs[at - 1, sample.tokens], atol=0.05)
