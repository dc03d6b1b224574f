"""Vectors: norms and resemblances by eye, and the encoder on a random model and on the real one."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models, pre_tokenizers, processors

from pmd_jax.embedding import EmbeddingConfig, Encoder, make_embed

WIDTH, MLP, LAYERS, HEADS, POSITIONS = 16, 32, 2, 4, 256


@pytest.mark.parametrize("dimensions", [0, -2, 511])
def test_dimensions_that_have_no_halves_are_refused(dimensions: int):
    with pytest.raises(ValueError, match=f"must be even and at least 2; got {dimensions}"):
        EmbeddingConfig(dimensions=dimensions)


def test_an_unknown_backend_is_refused():
    with pytest.raises((ValueError, TypeError), match="backend"):
        EmbeddingConfig(backend="openai")  # type: ignore[arg-type]


def test_hashed_rows_have_norm_one_or_are_zero():
    rows = make_embed(EmbeddingConfig(dimensions=64))(["molar mass", "x", "?", " \n"])
    assert (rows.shape, rows.dtype) == ((4, 64), np.float32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 1, 1, 0], atol=1e-6)
    assert make_embed(EmbeddingConfig(dimensions=64))([]).shape == (0, 64)


def test_hashed_texts_that_share_words_are_nearer():
    water, ethanol, lens = make_embed(EmbeddingConfig())(
        [
            "What is the molar mass of water?",
            "What is the molar mass of ethanol?",
            "A lens forms an image at twice its focal length.",
        ]
    )
    assert water @ ethanol > 0.5 > 0.2 > water @ lens


def test_hashed_sees_letters_endings_and_not_case():
    embed = make_embed(EmbeddingConfig())
    volt, joule, plural, upper = embed(["V", "J", "volts", "VOLTS"])
    volts = embed(["volt"])[0]
    assert volt @ volt == pytest.approx(1, abs=1e-6)
    assert volt @ joule < 0.1  # one-letter words count
    assert volts @ plural > 0.2  # by their characters
    assert plural @ upper == pytest.approx(1, abs=1e-6)


def test_hashed_repetition_weighs_by_its_logarithm():
    law, gas_law = make_embed(EmbeddingConfig(dimensions=4096))(["law", "gas " * 50 + "law"])
    assert law @ gas_law > 0.1  # 0.02 if counts entered as they are


def test_hashed_is_the_same_whatever_shares_the_call():
    embed = make_embed(EmbeddingConfig())
    texts = ["half-life of carbon-14", "", "Ohm's law"]
    np.testing.assert_array_equal(embed(texts), np.concatenate([embed([t]) for t in texts]))


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A BERT with random weights under the real names; words are w0 ... w9."""
    rng = np.random.default_rng(0)

    def dense(name: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
        return {
            f"{name}.weight": rng.normal(size=(outputs, inputs)).astype(np.float32) / inputs**0.5,
            f"{name}.bias": rng.normal(size=outputs).astype(np.float32),
        }

    def norm(name: str) -> dict[str, np.ndarray]:
        return {
            f"{name}.weight": rng.normal(size=WIDTH).astype(np.float32),
            f"{name}.bias": rng.normal(size=WIDTH).astype(np.float32),
        }

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(10))]
    weights = norm("embeddings.LayerNorm")
    for part, rows in {"word": len(words), "position": POSITIONS, "token_type": 2}.items():
        table = rng.normal(size=(rows, WIDTH)).astype(np.float32)
        weights[f"embeddings.{part}_embeddings.weight"] = table
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            weights |= dense(f"{name}.attention.{part}", WIDTH, WIDTH)
        weights |= dense(f"{name}.intermediate.dense", WIDTH, MLP)
        weights |= dense(f"{name}.output.dense", MLP, WIDTH)
        weights |= norm(f"{name}.attention.output.LayerNorm") | norm(f"{name}.output.LayerNorm")
    save_file(weights, tmp_path / "model.safetensors")

    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_padding(length=128)  # as in the real file; the encoder pads by itself
    tokenizer.enable_truncation(128)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path)
    return tmp_path


def write_config(folder: Path, **changes: object) -> None:
    config = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "layer_norm_eps": 1e-12,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_padding_and_neighbours_change_no_row(bert: Path):
    embed = make_embed(EmbeddingConfig(backend="minilm", path=str(bert)))
    texts = [" ".join(f"w{(i * j) % 10}" for j in range(1 + 7 * i % 40)) for i in range(37)]
    together = embed(texts)
    assert (together.shape, together.dtype) == ((37, WIDTH), np.float32)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    alone = np.concatenate([embed([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert np.abs(together[1] - together[2]).max() > 1e-3
    assert embed([]).shape == (0, WIDTH)


def test_order_matters_and_what_is_beyond_256_tokens_does_not(bert: Path):
    embed = make_embed(EmbeddingConfig(backend="minilm", path=str(bert)))
    forward, backward = embed(["w1 w2 w3", "w3 w2 w1"])
    assert np.abs(forward - backward).max() > 1e-3
    text = "w1 w2 " * 127  # 254 words, and [CLS] and [SEP]
    full, longer, shorter = embed([text, text + "w5 " * 50, text[:-3]])
    np.testing.assert_array_equal(full, longer)
    assert np.abs(full - shorter).max() > 1e-6


def test_weights_are_read_at_the_first_call(bert: Path):
    embed = make_embed(EmbeddingConfig(backend="minilm", path=str(bert)))
    write_config(bert, hidden_act="relu")
    with pytest.raises(
        ValueError, match="hidden_act must be 'gelu' for backend minilm; got 'relu'"
    ):
        embed(["w1"])
    write_config(bert, model_type="mpnet")
    with pytest.raises(ValueError, match="model_type must be 'bert'"):
        Encoder.load(bert)


@pytest.mark.slow
def test_the_real_encoder_gives_the_cosines_of_its_torch_original():
    embed = make_embed(EmbeddingConfig(backend="minilm"))
    rows = embed(
        [
            "A man is playing a guitar.",
            "Someone plays an instrument.",
            "What is the molar mass of water?",
            "How heavy is one mole of H2O?",
            "The stock market fell today.",
        ]
    )
    assert rows.shape == (5, 384)
    # torch 2.13.0 and transformers 5.23.0, mean pooling; its rows differ from ours by 2.4e-7.
    cosines = rows @ rows.T
    np.testing.assert_allclose(cosines[0, 1:], [0.66745, 0.08425, -0.02130, -0.04971], atol=2e-5)
    np.testing.assert_allclose(cosines[2, 3:], [0.54527, 0.06038], atol=2e-5)
