"""Response quality: a real local HTTP server as pairwise judge, and the measures that need none."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest

from dcr.errors import DCRError
from dcr.tables.quality import (
    KEY_VARIABLE,
    combine,
    compare_answers,
    distinct_n,
    parse_choice,
    reference_free,
    win_rate,
)

PAIRS = pd.DataFrame(
    [
        ("p0", "Name a fruit.", "GOOD apple", "bad"),
        ("p1", "Name a tool.", "bad", "GOOD saw"),
        ("p2", "Name a fish.", "same", "same"),
        ("p3", "babble", "x", "y"),
        ("p4", "broken", "x", "y"),
        ("p5", "first", "x", "y"),
        ("p6", "flaky", "GOOD", "bad"),
    ],
    columns=["prompt_id", "text", "answer", "against"],
)


class Judge(BaseHTTPRequestHandler):
    """Prefers the answer that says GOOD; babbles, breaks, prefers what comes first, or fails once, as the instruction asks."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        self.server.seen.append(
            {"path": self.path, "key": self.headers.get("Authorization"), **body}
        )
        if "broken" in text or ("flaky" in text and self.server.failures.pop("flaky", None)):
            return self.reply(500, {"error": {"message": "down"}})
        a, b = re.search(r"Answer A:\n(.*?)\n\nAnswer B:\n(.*?)\n\nWhich", text, re.S).groups()
        choice = (
            "I like both."
            if "babble" in text
            else "[[A]]"
            if "first" in text
            else "[[A]]"
            if "GOOD" in a
            else "[[B]]"
            if "GOOD" in b
            else "[[TIE]]"
        )
        return self.reply(
            200,
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": choice},
                    }
                ],
            },
        )

    def reply(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.seen, server.failures = [], {"flaky": True}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def url(server) -> str:
    return f"http://127.0.0.1:{server.server_port}/v1"


def test_both_orders_ties_retries_and_failures(server, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret-key-of-the-test")
    out = tmp_path / "pairs.jsonl"
    table = compare_answers(PAIRS, endpoint=url(server), model="judge-1", retries=1, out=out)
    assert dict(zip(table["prompt_id"], table["outcome"], strict=True)) == {
        "p0": "win",
        "p1": "loss",
        "p2": "tie",
        "p3": "unscored",
        "p4": "unscored",
        "p5": "tie",
        "p6": "win",
    }
    result = win_rate(table)
    assert (
        result["wins"],
        result["ties"],
        result["losses"],
        result["unscored"],
        result["parse_failures"],
    ) == (2, 2, 1, 2, 1)
    assert (
        result["value"] == pytest.approx(3 / 5)
        and result["order_flips"] == pytest.approx(1 / 5)
        and result["n"] == 7
    )
    assert {s["path"] for s in server.seen} == {"/v1/chat/completions"} and {
        s["temperature"] for s in server.seen
    } == {0.0}
    assert server.seen[0]["key"] == "Bearer secret-key-of-the-test"
    written = "".join(p.read_text() for p in tmp_path.iterdir())
    assert "secret-key" not in written and "judge-1" in written and "prompt_version" in written

    asked = len(server.seen)
    again = compare_answers(PAIRS, endpoint=url(server), model="judge-1", retries=1, out=out)
    assert len(server.seen) == asked and again.equals(table)
    with pytest.raises(DCRError, match="model: judge-1 -> judge-2"):
        compare_answers(PAIRS, endpoint=url(server), model="judge-2", out=out)


def test_an_endpoint_that_is_down_leaves_pairs_unscored():
    table = compare_answers(
        PAIRS.head(2), endpoint="http://127.0.0.1:9/v1", model="m", retries=0, timeout=2
    )
    assert (
        table["outcome"].tolist() == ["unscored"] * 2
        and table["error"].tolist() == ["APIConnectionError"] * 2
    )
    result = win_rate(table)
    assert result["value"] != result["value"] and result["unscored"] == 2


@pytest.mark.parametrize(
    "text, choice",
    [("[[A]]", "A"), ("I say [[ tie ]].", "TIE"), ("[[A]] or [[B]]", ""), ("A", ""), ("", "")],
)
def test_replies_are_parsed_strictly(text, choice):
    assert parse_choice(text) == choice


def test_orders_combine():
    assert [combine(*c) for c in (("A", "B"), ("B", "A"), ("A", "A"), ("TIE", "B"), ("", "A"))] == [
        "win",
        "loss",
        "tie",
        "tie",
        "unscored",
    ]


def test_measures_without_a_judge():
    prompts = pd.DataFrame({"id": ["a", "b"], "text": ["Name two fruits.", "Say a word."]})
    answers = pd.DataFrame(
        {
            "prompt_id": ["a", "b"],
            "response": ["apple pear", "no no no no no no no no no no no no"],
            "finish": ["eos", "length"],
        }
    )
    losses = pd.DataFrame({"loss": [2.0, 4.0], "tokens": [1, 2]})
    measures = reference_free(prompts, answers, losses)
    assert measures["words"] == 7 and measures["degenerate_share"] == measures["cut_share"] == 0.5
    assert measures["base_perplexity"] == pytest.approx(2.718281828**2) and not any(
        "win" in k for k in measures
    )
    assert distinct_n(["a b a b"], 1) == 0.5 and distinct_n(["a b a b"], 2) == pytest.approx(2 / 3)


def test_bad_input_is_refused():
    with pytest.raises(DCRError, match="'p0' occurs twice"):
        compare_answers(pd.concat([PAIRS, PAIRS]), endpoint="http://x", model="m")
    with pytest.raises(DCRError, match="must both be set"):
        compare_answers(PAIRS, endpoint="", model="m")
