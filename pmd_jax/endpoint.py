"""A chat model behind an OpenAI-compatible HTTP endpoint, as a function from prompts to texts.

For letting another model than the policy write behaviors. It is the standard library's HTTP
client: that of huggingface_hub sends the user's hub token to any URL when no other key is given,
and refuses even a local server under HF_HUB_OFFLINE.

Leaves out: streaming, sampling settings (the server's own defaults hold), batch endpoints.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from pmd_jax.records import Message

Generate = Callable[[Sequence[Sequence[Message]]], list[str]]

PREFIX = "openai:"
CONCURRENT_REQUESTS = 4
BACKOFF_SECONDS = 1.0  # before the first retry; doubles with each one
MAX_BACKOFF_SECONDS = 30.0


def parse_writer(writer: str) -> tuple[str, str]:
    """ "openai:http://host:port/v1#model" -> ("http://host:port/v1", "model")."""
    url, _, model = writer.removeprefix(PREFIX).partition("#")
    if not writer.startswith(PREFIX) or not model:
        raise ValueError(
            f"writer: must be openai:<url>#<model>, "
            f"such as openai:http://localhost:8000/v1#Qwen/Qwen3-8B; got {writer!r}"
        )
    return _checked_url(url), model


def make_endpoint(
    url: str,
    model: str,
    timeout_seconds: float = 120.0,
    retries: int = 4,
    max_new_tokens: int = 1024,
    api_key_env: str = "OPENAI_API_KEY",
) -> Generate:
    """A function from chats to the model's replies, in order, up to four requests at a time.

    url: without /chat/completions, such as http://localhost:8000/v1.
    timeout_seconds: longest silence of the server within one request.
    retries: further attempts after a lost connection, a timeout, status 429 or 5xx, with
    exponential backoff. Any other status fails at once.
    api_key_env: name of the environment variable with the key; unset or empty sends none.

    A chat whose last message is the assistant's is sent as it is. Whether the server continues that
    message or starts a new one is the server's choice, so a caller must be able to read both.
    An empty reply is the text ""; a reply in another shape, and every failure, is an EndpointError
    of one line.
    """
    url = _checked_url(url)
    headers = {"Content-Type": "application/json"}
    key = os.environ.get(api_key_env)
    if key:
        headers["Authorization"] = f"Bearer {key}"

    def ask(messages: Sequence[Message]) -> str:
        body = {"model": model, "messages": list(messages), "max_tokens": max_new_tokens}
        request = urllib.request.Request(
            f"{url}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        return _content(url, _send(request, url, timeout_seconds, retries))

    def generate(prompts: Sequence[Sequence[Message]]) -> list[str]:
        with concurrent.futures.ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            return list(pool.map(ask, prompts))

    return generate


class EndpointError(RuntimeError):
    """A server that refuses, keeps silent, or replies in another shape."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host; it fails as any other status does."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def _send(request: urllib.request.Request, url: str, timeout_seconds: float, retries: int) -> bytes:
    """The body of a reply of status 200, after at most `retries` further attempts."""
    problem = ""
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(min(BACKOFF_SECONDS * 2 ** (attempt - 1), MAX_BACKOFF_SECONDS))
        try:
            with _OPENER.open(request, timeout=timeout_seconds) as reply:
                return reply.read()
        except urllib.error.HTTPError as error:
            problem = f"status {error.code}: {_message(error)}"
            if error.code != 429 and error.code < 500:
                raise EndpointError(
                    f"{url}: refused the request ({problem}); check the URL, the model's name "
                    "and the API key"
                ) from None
        except TimeoutError:
            problem = f"no answer within {timeout_seconds:g} s"
        except (OSError, http.client.HTTPException) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
    raise EndpointError(
        f"{url}: no reply after {retries + 1} attempts ({problem}); "
        "check that the server runs, or raise timeout_seconds or retries"
    )


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says in the body, in one line: {"error": {"message": ...}} or plain text."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    try:
        body = json.loads(text)
    except json.JSONDecodeError:
        body = text or error.reason
    for name in ("error", "message", "detail"):
        body = body.get(name, body) if isinstance(body, dict) else body
    return " ".join(str(body).split())[:300]


def _content(url: str, reply: bytes) -> str:
    try:
        return json.loads(reply)["choices"][0]["message"]["content"] or ""
    except (ValueError, KeyError, IndexError, TypeError):
        raise EndpointError(
            f"{url}: the reply must be a chat completion with choices[0].message.content; "
            f"got {reply[:200]!r}; check that the URL is an OpenAI-compatible endpoint"
        ) from None


def _checked_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url: must be http://host:port/v1 or https://...; got {url!r}")
    return url.rstrip("/")
