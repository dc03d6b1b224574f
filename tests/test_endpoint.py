"""A server on loopback that answers as told, and what the endpoint makes of it."""

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pmd_jax import endpoint
from pmd_jax.endpoint import EndpointError, make_endpoint, parse_writer

Script = Callable[[int, dict], tuple[int, object]]


class Server:
    """script(number of the request, its body) -> status and body; requests are recorded."""

    def __init__(self) -> None:
        self.script: Script = lambda number, body: (200, reply("hello"))
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.paths: list[str] = []
        lock, outer = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.headers.append({k.lower(): v for k, v in self.headers.items()})
                    outer.paths.append(self.path)
                status, content = outer.script(number, body)
                data = (
                    content.encode() if isinstance(content, str) else json.dumps(content).encode()
                )
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.send_header("Location", "/elsewhere")
                    self.end_headers()
                    self.wfile.write(data)
                except ConnectionError:
                    return  # the client stopped waiting

            def log_message(self, *_: object) -> None:
                return

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint, "BACKOFF_SECONDS", 0.01)
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def reply(text: str | None) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_writer_names_a_url_and_a_model():
    found = parse_writer("openai:http://host:8000/v1/#Qwen/Qwen3-8B")
    assert found == ("http://host:8000/v1", "Qwen/Qwen3-8B")


@pytest.mark.parametrize(
    "writer", ["", "http://host/v1#m", "openai:http://host/v1", "openai:#m", "openai:file:///x#m"]
)
def test_other_writers_are_refused(writer: str):
    with pytest.raises(ValueError, match="must be"):
        parse_writer(writer)


def test_the_request_is_a_chat_completion(server: Server):
    messages = [*chat("question"), {"role": "assistant", "content": '{"skills": ['}]
    assert make_endpoint(server.url, "m", max_new_tokens=7)([messages]) == ["hello"]
    assert server.paths == ["/v1/chat/completions"]
    assert server.bodies == [{"model": "m", "messages": messages, "max_tokens": 7}]
    assert "authorization" not in server.headers[0]
    assert make_endpoint(server.url, "m")([]) == []


def test_only_the_named_key_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    monkeypatch.setenv("MY_KEY", "secret")
    make_endpoint(server.url, "m")([chat("a")])
    make_endpoint(server.url, "m", api_key_env="MY_KEY")([chat("a")])
    assert [headers.get("authorization") for headers in server.headers] == [None, "Bearer secret"]


def test_replies_keep_the_order_of_prompts_and_four_run_at_once(server: Server):
    four = threading.Barrier(4, timeout=5)

    def script(number: int, body: dict) -> tuple[int, object]:
        if number < 4:
            four.wait()  # breaks, and fails the test, unless four requests are under way
        time.sleep(0.02 * (number % 3))
        return 200, reply(body["messages"][0]["content"].upper())

    server.script = script
    letters = list("abcdefgh")
    replies = make_endpoint(server.url, "m", timeout_seconds=5)(
        [chat(letter) for letter in letters]
    )
    assert replies == [letter.upper() for letter in letters]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_failure_is_tried_again(server: Server, status: int):
    server.script = lambda number, body: (status, "busy") if number < 2 else (200, reply("at last"))
    assert make_endpoint(server.url, "m", retries=2)([chat("a")]) == ["at last"]
    assert len(server.bodies) == 3


def test_the_last_attempt_names_the_failure(server: Server):
    server.script = lambda number, body: (500, {"error": {"message": "out of\nmemory"}})
    with pytest.raises(
        EndpointError, match=r"no reply after 2 attempts \(status 500: out of memory\)"
    ):
        make_endpoint(server.url, "m", retries=1)([chat("a")])
    assert len(server.bodies) == 2


def test_waits_double(server: Server, monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    monkeypatch.setattr(endpoint, "BACKOFF_SECONDS", 8.0)
    monkeypatch.setattr(endpoint.time, "sleep", waits.append)
    server.script = lambda number, body: (500, "")
    with pytest.raises(EndpointError):
        make_endpoint(server.url, "m", retries=4)([chat("a")])
    assert waits == [8, 16, 30, 30]


def test_a_refused_key_fails_at_once_and_is_not_printed(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.script = lambda number, body: (401, {"error": {"message": "Incorrect API key"}})
    with pytest.raises(EndpointError) as caught:
        make_endpoint(server.url, "m")([chat("a")])
    assert "refused the request (status 401: Incorrect API key)" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(server.bodies) == 1


def test_a_redirect_is_not_followed(server: Server):
    server.script = lambda number, body: (302, "")
    with pytest.raises(EndpointError, match="status 302"):
        make_endpoint(server.url, "m")([chat("a")])
    assert server.paths == ["/v1/chat/completions"]


def test_silence_ends_after_the_timeout(server: Server):
    waiting = threading.Event()
    server.script = lambda number, body: (200, reply(str(waiting.wait(5))))
    with pytest.raises(EndpointError, match=r"after 2 attempts \(no answer within 0\.1 s\)"):
        make_endpoint(server.url, "m", timeout_seconds=0.1, retries=1)([chat("a")])
    waiting.set()
    assert len(server.bodies) == 2


def test_a_server_that_is_not_there_is_one_line(server: Server):
    server.http.server_close()
    with pytest.raises(
        EndpointError, match=r"no reply after 2 attempts .*refused.*check that the server"
    ):
        make_endpoint(server.url, "m", retries=1)([chat("a")])


def test_an_empty_reply_is_empty_and_another_shape_an_error(server: Server):
    server.script = lambda number, body: (200, reply(None))
    assert make_endpoint(server.url, "m")([chat("a")]) == [""]
    for other in ({"choices": []}, ["x"], "<html>"):
        server.script = lambda number, body, other=other: (200, other)
        with pytest.raises(EndpointError, match="must be a chat completion"):
            make_endpoint(server.url, "m")([chat("a")])
