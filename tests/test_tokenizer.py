"""Encodings of a tokenizer small enough to read: bytes, two merges, and ChatML's markers."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from pmd_jax.policy.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}\n"
    "    {% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if not enable_thinking %}{{ '<think></think>' }}{% endif %}"
    "{% endif %}"
)
START, END = 258, 259
USER = [{"role": "user", "content": "abc"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ids 0-255 are bytes in the order of their printable stand-ins; 256 is "ab", 257 is "abc"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "ab", "abc"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("ab", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")]
    )
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", chat_template=CHATML, eos_token="<|im_end|>")
    return tmp_path


def write(folder: Path, name: str, **content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def test_text_becomes_merged_tokens_and_comes_back(folder: Path):
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("abcab") == [257, 256]
    assert tokenizer.encode("") == []
    assert tokenizer.decode([257, 256]) == "abcab"
    assert tokenizer.vocab_size == 260
    # The file asks for truncation at 4 tokens; a prompt must not be shortened in silence.
    assert tokenizer.count("d" * 9) == 9


def test_special_tokens_are_read_in_text_and_left_out_of_it(folder: Path):
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("ab<|im_end|>") == [256, END]
    assert tokenizer.decode([256, END]) == "ab"
    assert tokenizer.decode([256, END], skip_special_tokens=False) == "ab<|im_end|>"


def test_decode_never_raises(folder: Path):
    tokenizer = Tokenizer.load(folder)
    first, second = tokenizer.encode("é")
    assert tokenizer.decode([257, first]) == "abc\ufffd"
    assert tokenizer.decode([first, second]) == "é"
    assert tokenizer.decode([257, 99_999, -1]) == "abc"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("text", ["two words", "naïve 🧪 test", "a<|im_end|>"])
def test_pieces_of_tokens_join_to_the_text(folder: Path, text: str):
    tokenizer = Tokenizer.load(folder)
    tokens = tokenizer.encode(text)
    pieces = tokenizer.pieces(tokens)
    assert len(pieces) == len(tokens) and "".join(pieces) == text


def test_a_character_cut_short_is_one_piece(folder: Path):
    tokenizer = Tokenizer.load(folder)
    tokens = tokenizer.encode("🧪")
    assert len(tokens) > 1
    assert "".join(tokenizer.pieces(tokens[:-1])).strip("\ufffd") == ""
    assert tokenizer.pieces(tokens) == ["", "", "", "🧪"][-len(tokens) :]
    assert tokenizer.pieces([]) == []


def test_chat_ends_with_the_generation_prompt(folder: Path):
    tokenizer = Tokenizer.load(folder)
    rendered = "<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n<think></think>"
    assert tokenizer.render_chat(USER) == rendered
    tokens = tokenizer.encode_chat(USER)
    assert tokens == tokenizer.encode(rendered)
    assert [token for token in tokens if token >= 256] == [START, 257, END, START]


def test_template_variables_can_be_given(folder: Path):
    rendered = Tokenizer.load(folder).render_chat(USER, enable_thinking=True)
    assert rendered.endswith("<|im_start|>assistant\n")


def test_last_assistant_message_is_continued(folder: Path):
    tokenizer = Tokenizer.load(folder)
    prefix = [{"role": "assistant", "content": "<answer>"}]
    assert tokenizer.encode_chat(USER + prefix) == [
        *tokenizer.encode_chat(USER),
        *tokenizer.encode("<answer>"),
    ]
    earlier = [*USER, {"role": "assistant", "content": "ab"}, *USER]
    assert "assistant\nab<|im_end|>\n" in tokenizer.render_chat(earlier)
    with pytest.raises(ValueError, match="a turn that the assistant answers"):
        tokenizer.encode_chat(prefix)


def test_template_refusal_and_absence_are_one_line(folder: Path):
    with pytest.raises(ValueError, match="chat template: no tools here"):
        Tokenizer.load(folder).encode_chat([{"role": "tool", "content": ""}])
    write(folder, "tokenizer_config.json", eos_token="<|im_end|>")
    with pytest.raises(ValueError, match="has no chat template"):
        Tokenizer.load(folder).encode_chat(USER)
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ValueError, match="chat template: "):
        Tokenizer.load(folder)


def test_templates_have_what_transformers_gives_them(folder: Path):
    def rendered(template: str) -> str:
        (folder / "chat_template.jinja").write_text(template)
        return Tokenizer.load(folder).render_chat(USER)

    assert rendered("{{ messages | tojson }}") == '[{"role": "user", "content": "abc"}]'
    assert rendered("{{ '<é>' | tojson }}") == '"<é>"'
    assert (
        rendered("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}")
        == "1"
    )
    assert rendered("[{{ bos_token }}{{ eos_token }}]") == "[<|im_end|>]"
    assert rendered("{% generation %}a{% endgeneration %}") == "a"
    assert rendered("{{ strftime_now('%Y') }}").isdigit()
    assert rendered("  {% if true %}\nx\n  {% endif %}\n") == "x\n"  # trim_blocks, lstrip_blocks
    with pytest.raises(ValueError, match="chat template: "):
        rendered("{{ ''.__class__.__mro__ }}")


def test_stop_and_pad_tokens_come_from_the_first_file_that_names_them(folder: Path):
    def load() -> tuple[tuple[int, ...], int]:
        tokenizer = Tokenizer.load(folder)
        return tokenizer.stop_tokens, tokenizer.pad_token

    assert load() == ((END,), END)
    write(folder, "config.json", eos_token_id=7, pad_token_id=3)
    assert load() == ((7,), 3)
    write(folder, "generation_config.json", eos_token_id=[END, 9])
    assert load() == ((END, 9), 3)
    special = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|im_start|>"}
    write(folder, "tokenizer_config.json", **special)
    assert load() == ((END, 9), START)


def test_a_folder_without_a_stop_token_or_a_tokenizer_is_refused(folder: Path):
    write(folder, "tokenizer_config.json")
    with pytest.raises(ValueError, match="names no stop token"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor"):
        Tokenizer.load(folder)


def test_cut_keeps_a_prefix_within_the_limit(folder: Path):
    tokenizer = Tokenizer.load(folder)
    text = "abcabcdé"  # abc, abc, d, and two bytes of é
    assert [tokenizer.cut(text, n) for n in range(7)] == [
        "",
        "abc",
        "abcabc",
        "abcabcd",
        "abcabcd",
        "abcabcdé",
        "abcabcdé",
    ]
    with pytest.raises(ValueError, match="max_tokens: must be at least 0; got -1"):
        tokenizer.cut(text, -1)


def test_saved_tokenizer_is_the_same(folder: Path):
    write(folder, "generation_config.json", eos_token_id=[END, 9])
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(folder / "export" / "model")
    again = Tokenizer.load(folder / "export" / "model")
    assert again.encode_chat(USER) == tokenizer.encode_chat(USER)
    assert again.stop_tokens == (END, 9)


@pytest.fixture
def sentencepiece_folder(tmp_path: Path) -> Path:
    """Ids 0, 1, 2 are <unk>, <s>, </s>; one token is added behind the pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world the cat sat"] * 20),
        model_writer=model,
        vocab_size=30,
        model_type="bpe",
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    added = {"30": {"content": "<turn>", "special": True}}
    write(
        tmp_path,
        "tokenizer_config.json",
        added_tokens_decoder=added,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{{ bos_token }}{{ messages[0]['content'] }}<turn>",
    )
    return tmp_path


def test_sentencepiece_reads_text_and_special_tokens(sentencepiece_folder: Path):
    tokenizer = Tokenizer.load(sentencepiece_folder)
    assert (tokenizer.stop_tokens, tokenizer.vocab_size) == ((2,), 31)
    tokens = tokenizer.encode("hello world")
    assert tokenizer.decode(tokens) == "hello world"
    chat = tokenizer.encode_chat([{"role": "user", "content": "hello world"}])
    assert chat == [1, *tokens, 30]
    assert tokenizer.decode(chat) == "hello world"
    assert tokenizer.decode(chat, skip_special_tokens=False) == "<s>hello world<turn>"
    assert tokenizer.decode([*tokens, 99]) == "hello world"


def test_sentencepiece_pieces_keep_their_spaces(sentencepiece_folder: Path):
    tokenizer = Tokenizer.load(sentencepiece_folder)
    tokens = tokenizer.encode("the cat")
    assert "".join(tokenizer.pieces(tokens)).strip() == "the cat"


def test_sentencepiece_cut_survives_normalised_spaces(sentencepiece_folder: Path):
    tokenizer = Tokenizer.load(sentencepiece_folder)
    text = "the  cat   sat the cat"
    for limit in range(tokenizer.count(text)):
        cut = tokenizer.cut(text, limit)
        assert text.startswith(cut)
        assert tokenizer.count(cut) <= limit
    assert tokenizer.cut(text, tokenizer.count(text) - 1).startswith("the  cat   sat")
