"""Answers from an OpenAI-compatible server: a local stdlib server that fails in every way, and
`transformers serve`."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest

from dcr.config import GenerationConfig
from dcr.errors import DCRError
from dcr.evaluate.judges import judge
from dcr.lm.endpoint import Endpoint, generate_remote
from dcr.lm.generate import COLUMNS

TABLE = pd.DataFrame(
    {
        "id": ["a", "b", "c"],
        "text": ["How do I bake bread?", "List dogs.", "Tell me a story."],
        "label": "general",
    }
)


class Server(ThreadingHTTPServer):
    """Answers `reply(prompt, attempt)`: text, an int status, bytes as they are, or seconds to sleep
    (float)."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.seen, self.bodies, self.headers_seen, self.mutex = (
            reply,
            {},
            [],
            [],
            threading.Lock(),
        )
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self._send(200, json.dumps({"data": [{"id": "tiny"}]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][0]["content"]
        with self.server.mutex:
            self.server.seen[prompt] = self.server.seen.get(prompt, 0) + 1
            self.server.bodies.append(body)
            self.server.headers_seen.append(self.headers.get("authorization"))
            attempt = self.server.seen[prompt]
        reply = self.server.reply(prompt, attempt)
        if isinstance(reply, float):
            time.sleep(reply)
            reply = "late"
        if isinstance(reply, int):
            return self._send(reply, b"{}")
        if isinstance(reply, tuple):
            return self._send(reply[0], json.dumps(reply[1]).encode())
        if isinstance(reply, bytes):
            return self._send(200, reply)
        self._send(
            200,
            json.dumps(
                {
                    "choices": [
                        {
                            "message": {"role": "assistant", "content": reply},
                            "finish_reason": "stop",
                        }
                    ],
                    "usage": {"completion_tokens": 3},
                }
            ).encode(),
        )

    def _send(self, status, content):
        try:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except BrokenPipeError:  # the client's timeout
            pass


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(server, table=TABLE, *, seed=0, out=None, concurrency=8, **options):
    ours = {k: options.pop(k) for k in ("timeout", "retries") if k in options}
    endpoint = Endpoint(server.url, **{"retries": 2, "timeout": 5.0, **ours})
    return generate_remote(
        table,
        GenerationConfig(endpoint=server.url, **options),
        method="STL",
        seed=seed,
        out=out,
        server=endpoint,
        concurrency=concurrency,
    )


def test_rows_are_those_of_local_generation_and_the_request_is_as_asked(serve):
    server = serve(lambda prompt, _: f"answer to {prompt} ")
    rows = ask(server, max_new_tokens=7, temperature=0.0, seed=3)
    assert list(rows) == COLUMNS and rows["prompt_id"].tolist() == ["a", "b", "c"]
    assert rows["response"].tolist() == [f"answer to {t}" for t in TABLE["text"]] and set(
        rows["finish"]
    ) == {"eos"}
    assert all(
        (b["max_tokens"], b["temperature"], b["seed"], b["model"]) == (7, 0.0, 3, "tiny")
        for b in server.bodies
    )


@pytest.mark.parametrize(
    "fault",
    [500, 429, b"{not json", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}'],
)
def test_a_passing_fault_is_retried(serve, fault):
    server = serve(lambda prompt, attempt: fault if attempt == 1 else "fine")
    assert ask(server)["response"].tolist() == ["fine"] * 3 and set(server.seen.values()) == {2}


def test_a_timeout_is_retried(serve):
    server = serve(lambda prompt, attempt: 1.0 if attempt == 1 else "fine")
    assert ask(server, timeout=0.3)["response"].tolist() == ["fine"] * 3


def test_what_fails_for_good_is_missing_counted_and_unscored_then_asked_again(
    serve, tmp_path, caplog
):
    out = tmp_path / "g.jsonl"
    server = serve(
        lambda prompt, _: (
            503 if prompt == "List dogs." and server.seen[prompt] <= 3 else "Sure, flour and water."
        )
    )
    rows = ask(server, out=out)
    assert (
        rows["prompt_id"].tolist() == ["a", "c"] and "1 of 3 prompts got no answer" in caplog.text
    )
    assert judge(TABLE, rows, "phrases")["verdict"].tolist() == ["comply", "unscored", "comply"]
    assert (
        ask(server, out=out)["prompt_id"].tolist() == ["a", "b", "c"]
        and server.seen["List dogs."] == 4
    )
    assert server.seen["Tell me a story."] == 1
    with pytest.raises(DCRError, match="max_new_tokens: 24 -> 5"):
        ask(server, out=out, max_new_tokens=5)


def test_a_refused_request_is_not_repeated_and_the_servers_reason_is_told(serve, caplog):
    why = {"error": {"message": "maximum context length is 8 tokens", "code": 400}}
    server = serve(lambda prompt, _: (400, why) if prompt == "List dogs." else "fine")
    assert ask(server)["prompt_id"].tolist() == ["a", "c"] and server.seen["List dogs."] == 1
    assert "status 400: maximum context length is 8 tokens" in caplog.text
    vllm = {"object": "error", "message": "The model `DCR` does not exist.", "code": 404}
    with pytest.raises(DCRError, match="status 404: The model `DCR` does not exist"):
        ask(serve(lambda prompt, _: (404, vllm)))


@pytest.mark.parametrize(
    "message, text",
    [
        ({"content": None, "refusal": "I cannot help with that."}, "I cannot help with that."),
        ({"content": [{"type": "text", "text": "Flour "}, {"type": "text", "text": "and"}]}, "Flour and"),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"content": "<think>a</think>Flour"}, "Flour"),
        ({"content": "Flour \ud83d"}, "Flour ?"),  # half a character
    ],
)  # fmt: skip
def test_every_shape_of_an_answer_is_read(serve, message, text):
    whole = {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": "stop"}]}
    server = serve(lambda *_: json.dumps(whole).encode())
    rows = ask(server)
    assert rows["response"].tolist() == [text] * 3 and rows["n_tokens"].tolist() == [-1] * 3


def test_each_method_has_its_served_name(serve):
    server = serve(lambda *_: "fine")
    generate_remote(TABLE, GenerationConfig(endpoint=server.url), served="DCR-lora")
    assert {b["model"] for b in server.bodies} == {"DCR-lora"}


def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    serve, tmp_path, monkeypatch, caplog
):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-for-test")
    server = serve(lambda prompt, _: 500 if prompt == "List dogs." else "fine")
    ask(server, out=tmp_path / "g.jsonl")
    assert set(server.headers_seen) == {"Bearer sk-secret-for-test"}
    assert "sk-secret" not in caplog.text + "".join(p.read_text() for p in tmp_path.iterdir())


def test_a_server_that_answers_nothing_or_is_down(serve):
    server = serve(lambda prompt, _: 500)
    table = pd.DataFrame(
        {"id": [str(i) for i in range(60)], "text": [f"prompt {i}" for i in range(60)]}
    )
    with pytest.raises(DCRError, match="none of 60 prompts was answered .status 500"):
        ask(server, table, retries=0, concurrency=2)
    assert len(server.seen) < 60, "gives up instead of asking all"
    with pytest.raises(DCRError, match="did not name a model"):
        Endpoint("http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(DCRError, match="no address"):
        generate_remote(TABLE, GenerationConfig(endpoint="localhost:8000"))
    with pytest.raises(DCRError, match="row 1 .*id 'a' stands already"):
        ask(server, TABLE.assign(id="a"))


@pytest.mark.slow
def test_transformers_serve_gives_the_local_answers(tmp_path):
    """A real OpenAI-compatible server of a tiny model: greedy answers equal `dcr.generate`'s."""
    from conftest import make_model, make_tokenizer

    from dcr.lm.generate import generate

    model, tokenizer = make_model("llama", seed=3), make_tokenizer()
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [
            str(Path(sys.executable).parent / "transformers"),
            "serve",
            str(tmp_path / "tiny"),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--device",
            "cpu",
            "--dtype",
            "float32",
        ],
        stdout=(tmp_path / "log").open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (
                tmp_path / "log"
            ).read_text()[-2000:]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.5)
        url = f"http://127.0.0.1:{port}/v1"
        name = str(tmp_path / "tiny")
        rows = generate_remote(
            TABLE,
            GenerationConfig(endpoint=url, max_new_tokens=6),
            server=Endpoint(url, name, timeout=120),
            concurrency=1,
        )
    finally:
        process.terminate()
        process.wait(30)
    local = generate(model, tokenizer, TABLE, max_new_tokens=6)
    assert (
        rows["response"].tolist() == local["response"].tolist()
        and rows["prompt_id"].tolist() == TABLE["id"].tolist()
    )


def test_a_stop_ends_the_asking(serve, monkeypatch):
    server = serve(lambda prompt, attempt: 0.1)
    many = pd.DataFrame({"id": range(60), "text": [f"Prompt {i}." for i in range(60)]})
    many = many.assign(id=many["id"].astype(str), label="general")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dcr.lm.generate.Answers.add", stop)
    with pytest.raises(KeyboardInterrupt):
        ask(server, many, concurrency=2)
    assert len(server.bodies) < 10


def test_a_malformed_address_is_told():
    with pytest.raises(DCRError, match="is no address"):
        Endpoint("http://localhost:port/v1", "m")
