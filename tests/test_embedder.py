"""Vectors from a decoder: the last token's state at length 1, whoever shares the batch."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from fakes import behavior, problem
from safetensors.numpy import save_file
from toys import F32, TEXT_CONFIG, toy_tensors, write_model_folder

from pmd_jax.embedding import EmbeddingConfig, make_embed, query_prefix
from pmd_jax.memory.bank import Bank, MemoryConfig, Operation
from pmd_jax.memory.retrieval import Retriever
from pmd_jax.policy import model
from pmd_jax.policy.embedder import Embedder

QWEN = dataclasses.replace(TEXT_CONFIG, family="qwen3", qk_norm="head")
TEXTS = ["a", "Which gas law relates pressure and volume?", "", "b" * 100, "pH of HCl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model_folder(tmp_path_factory.mktemp("models") / "qwen", QWEN)


@pytest.fixture(scope="module")
def embedder(folder):
    return Embedder.load(folder)


def test_a_vector_is_the_last_state_of_the_text_and_its_end(embedder):
    tokens = [*embedder.tokenizer.encode("pH"), 256]
    hidden = model.causal_hidden(embedder.params, jnp.asarray([tokens], jnp.int32), QWEN, F32)
    last = np.asarray(hidden[0, -1])
    [row] = embedder.embed(["pH"])
    np.testing.assert_allclose(row, last / np.linalg.norm(last), atol=1e-6)


def test_neighbours_and_padding_change_no_row(embedder):
    together = embedder.embed(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for text, row in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(embedder.embed([text])[0], row, atol=1e-6)
    assert embedder.embed([]).shape == (0, 32)


def test_the_folders_own_end_of_text_is_taken_where_there_is_one(embedder, monkeypatch):
    monkeypatch.setattr("pmd_jax.policy.embedder.END", "<|im_end|>")
    assert embedder.tokens("pH")[-1] == 258


def test_long_texts_come_in_smaller_batches(embedder, monkeypatch):
    together = embedder.embed(TEXTS)
    monkeypatch.setattr("pmd_jax.policy.embedder.MAX_PAIRS", 128**2)
    np.testing.assert_allclose(embedder.embed(TEXTS), together, atol=1e-6)


def test_a_long_text_is_cut_and_still_ended(embedder):
    tokens = embedder.tokens("x" * 10_000)
    assert len(tokens) == QWEN.max_positions and tokens[-1] == 256


def test_a_model_saved_without_head_and_prefix_loads(tmp_path, embedder):
    untied = dataclasses.replace(QWEN, tied_head=False)
    folder = write_model_folder(tmp_path / "bare", untied)
    tensors = {k.removeprefix("model."): v for k, v in toy_tensors(QWEN).items()}
    save_file(tensors, folder / "model.safetensors")
    np.testing.assert_array_equal(Embedder.load(folder).embed(TEXTS), embedder.embed(TEXTS))


def test_questions_carry_the_instruction_and_behaviors_do_not(folder):
    config = EmbeddingConfig("qwen3", str(folder), instruction="Find advice")
    assert query_prefix(config) == "Instruct: Find advice\nQuery:"
    assert query_prefix(EmbeddingConfig()) == ""
    seen, embed = [], make_embed(config)

    def watched(texts):
        seen.extend(texts)
        return embed(texts)

    bank, question = Bank(MemoryConfig()), problem(0)
    bank.apply_operations(0, [Operation("ADD", behavior())], embed)
    [[found]] = Retriever(watched, query_prefix(config)).behaviors_for([question], bank, 1)
    assert seen == [f"Instruct: Find advice\nQuery:{question.question}", found.text]
