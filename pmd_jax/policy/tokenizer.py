"""Text and chats to token ids and back, from the tokenizer files of a Hugging Face folder.

tokenizer.json is read by `tokenizers`; a folder that has only tokenizer.model, by `sentencepiece`.
The chat template is rendered with jinja2 in a sandbox, under the settings, filters and globals that
transformers gives to templates.

Leaves out: tools and documents in templates, images, and named templates other than "default".
"""

from __future__ import annotations

import bisect
import dataclasses
import datetime
import functools
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np
import sentencepiece
import tokenizers

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
UTF8_BYTES = 4  # the most that a character takes
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@runtime_checkable
class Backend(Protocol):
    """What a tokenizer library must do. encode reads special tokens in text as such, adds none."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str: ...
    def token_id(self, token: str) -> int | None: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A folder's tokenizer. Make it with `Tokenizer.load`.

    special_tokens: the template's variables, such as {"bos_token": "<s>"}.
    stop_tokens: ids that end a response. pad_token: an id to fill rows with; may be a stop token.
    """

    folder: Path
    backend: Backend
    chat_template: jinja2.Template | None
    special_tokens: Mapping[str, str]
    stop_tokens: tuple[int, ...]
    pad_token: int

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads the files of a model folder.

        stop_tokens come from generation_config.json (eos_token_id, one or several), else from
        config.json, else from the tokenizer's eos_token. pad_token is the tokenizer's, else that of
        these configs, else the first stop token. Raises ValueError where a folder has no tokenizer,
        or names no stop token.
        """
        folder = Path(folder)
        config = _read_json(folder, "tokenizer_config.json")
        backend = _load_backend(folder, config)
        special = _special_tokens(_read_json(folder, "special_tokens_map.json") | config)
        ids = _read_json(folder, "config.json") | _read_json(folder, "generation_config.json")
        stop = _id_list(ids.get("eos_token_id")) or _ids(backend, special.get("eos_token"))
        if not stop:
            raise ValueError(
                f"{folder}: names no stop token; set eos_token_id in its generation_config.json"
            )
        pad = _ids(backend, special.get("pad_token")) or _id_list(ids.get("pad_token_id")) or stop
        source = _template_source(folder, config)
        template = None if source is None else _compile(folder, source)
        return cls(folder, backend, template, special, stop, pad[0])

    @property
    def vocab_size(self) -> int:
        """Number of ids with a text; a model may have more rows in its embedding."""
        return self.backend.vocab_size

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Nothing is added; special tokens written in it are read as such."""
        return self.backend.encode(text)

    def decode(self, tokens: Iterable[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """The text of `tokens`.

        Never raises: half a character becomes U+FFFD, and ids without a text, which a model with a
        padded vocabulary can emit, become nothing.
        """
        known = [token for token in map(int, tokens) if 0 <= token < self.vocab_size]
        return self.backend.decode(known, skip_special_tokens)

    def pieces(self, tokens: Iterable[int] | np.ndarray) -> list[str]:
        """What each token adds to the text, special tokens spelled out; one str per token.

        A character cut over several tokens stands with the last of them, "" with the others.
        """
        pieces: list[str] = []
        waiting: list[int] = []
        for token in map(int, tokens):
            if not waiting and (known := self._whole_pieces.get(token)) is not None:
                pieces.append(known)
                continue
            waiting.append(token)
            # Behind a token that is plain, where a tokenizer would drop a space that leads a text.
            text = self.decode([*self._anchor, *waiting], False)[len(self._anchor_text) :]
            whole = not text.endswith("\ufffd") or len(waiting) == UTF8_BYTES
            pieces.append(text if whole else "")
            if whole and len(waiting) == 1:
                self._whole_pieces[token] = text
            waiting = [] if whole else waiting
        if waiting:
            pieces[-1] = text
        return pieces

    @functools.cached_property
    def _whole_pieces(self) -> dict[int, str]:
        """Pieces found so far that are whole by themselves."""
        return {}

    @functools.cached_property
    def _anchor(self) -> list[int]:
        return self.encode("a")[-1:]

    @functools.cached_property
    def _anchor_text(self) -> str:
        return self.decode(self._anchor, False)

    def render_chat(self, messages: Sequence[Mapping[str, str]], **template_kwargs: Any) -> str:
        """The chat as the model reads it, up to where its answer begins.

        A last message of role "assistant" is the beginning of that answer: its content follows the
        generation prompt as it is, with no closing token. enable_thinking is False unless given;
        templates that do not know a variable ignore it. Raises ValueError where there is no
        template, no turn to answer, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError(
                f"{self.folder}: has no chat template; add chat_template.jinja to it, "
                "or name an instruct model"
            )
        messages, prefix = list(messages), ""
        if messages and messages[-1]["role"] == "assistant":
            prefix = messages.pop()["content"]
        if not messages:
            raise ValueError("messages: must hold a turn that the assistant answers; got none")
        variables = {"enable_thinking": False, **self.special_tokens, **template_kwargs}
        try:
            rendered = self.chat_template.render(
                messages=messages, add_generation_prompt=True, **variables
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"{self.folder}: chat template: {error}") from error
        return rendered + prefix

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], **template_kwargs: Any
    ) -> list[int]:
        """Token ids of `render_chat`."""
        return self.encode(self.render_chat(messages, **template_kwargs))

    def count(self, text: str) -> int:
        """Number of tokens of `text`."""
        return len(self.encode(text))

    def cut(self, text: str, max_tokens: int) -> str:
        """The prefix of `text` that its own first max_tokens tokens spell, in whole characters.

        The prefix encodes to at most max_tokens tokens again; where that would fail, or decoding
        does not give the text back (SentencePiece may normalise it), another is found by bisection.
        """
        if max_tokens < 0:
            raise ValueError(f"max_tokens: must be at least 0; got {max_tokens}")
        tokens = self.encode(text)
        if len(tokens) <= max_tokens:
            return text
        prefix = self.decode(tokens[:max_tokens], skip_special_tokens=False).rstrip("\ufffd")
        if text.startswith(prefix) and self.count(prefix) <= max_tokens:
            return prefix
        # Bisection moves right only past a prefix that fits, so the one returned was seen to fit.
        lengths = range(1, len(text) + 1)
        return text[: bisect.bisect_right(lengths, max_tokens, key=lambda n: self.count(text[:n]))]

    def save(self, folder: str | Path) -> None:
        """Copies the tokenizer files, stop tokens included, unchanged into `folder`."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, target / name)


class _Fast:
    """tokenizer.json, by the `tokenizers` library."""

    def __init__(self, file: Path) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)


class _SentencePiece:
    """tokenizer.model, by the `sentencepiece` library.

    It does not read special tokens in text, so text is split at them first and every part encoded
    by itself, which is what transformers' slow tokenizers do. Special are the model's control
    pieces and what tokenizer_config.json adds.
    """

    def __init__(self, file: Path, config: Mapping[str, Any]) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        pieces = self.model.get_piece_size()
        self.special = {
            self.model.id_to_piece(i): i for i in range(pieces) if self.model.is_control(i)
        }
        for token_id, token in config.get("added_tokens_decoder", {}).items():
            self.special[token["content"]] = int(token_id)
        self.special_text = {token_id: text for text, token_id in self.special.items()}
        self.vocab_size = max([pieces - 1, *self.special_text]) + 1
        longest_first = sorted(self.special, key=len, reverse=True)
        self.splitter = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = []
        for part in filter(None, self.splitter.split(text)):
            known = self.special.get(part)
            tokens += self.model.encode(part) if known is None else [known]
        return tokens

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        parts: list[str] = []
        plain: list[int] = []
        for token in tokens:
            if token not in self.special_text:
                plain.append(token)
            elif not skip_special_tokens:
                parts += [self.model.decode(plain), self.special_text[token]]
                plain = []
        return "".join([*parts, self.model.decode(plain)])

    def token_id(self, token: str) -> int | None:
        if token in self.special:
            return self.special[token]
        found = self.model.piece_to_id(token)
        return found if self.model.id_to_piece(found) == token else None


def _load_backend(folder: Path, config: Mapping[str, Any]) -> Backend:
    if (folder / "tokenizer.json").is_file():
        return _Fast(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        return _SentencePiece(folder / "tokenizer.model", config)
    raise ValueError(
        f"{folder}: holds neither tokenizer.json nor tokenizer.model; name a Hugging Face folder"
    )


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """The file as a dict; an absent file is an empty one."""
    file = folder / name
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: must be JSON; {error}") from None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """{"eos_token": "</s>", ...}; the files hold a string or {"content": string}."""
    entries = {name: config[name] for name in SPECIAL if config.get(name)}
    return {
        n: token if isinstance(token, str) else token["content"] for n, token in entries.items()
    }


def _id_list(value: int | Sequence[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _ids(backend: Backend, token: str | None) -> tuple[int, ...]:
    return _id_list(None if token is None else backend.token_id(token))


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja wins over tokenizer_config.json, as in transformers."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):
        return {entry["name"]: entry["template"] for entry in source}.get("default")
    return source


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's text; here it is only text."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(folder: Path, source: str) -> jinja2.Template:
    """The template under transformers' settings (utils/chat_template_utils.py)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"{folder}: chat template: {error}") from error


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML characters, which a prompt does not want."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
