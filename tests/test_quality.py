"""Response quality: a real local HTTP server as pairwise judge, and the measures that need none."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest

from dcr.config import EvaluationConfig
from dcr.errors import DCRError
from dcr.evaluate.intervals import mean_interval
from dcr.evaluate.quality import (
    KEY_VARIABLE,
    combine,
    compare_answers,
    distinct_n,
    parse_choice,
    quality,
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
    """Prefers the answer that says GOOD; babbles, breaks or fails once where it is asked to."""

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
    table = compare_answers(PAIRS.head(2), endpoint="http://127.0.0.1:9/v1", model="m", retries=0)
    assert (
        table["outcome"].tolist() == ["unscored"] * 2
        and table["error"].tolist() == ["APIConnectionError after 1 attempts"] * 2
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


def answered(prompts: pd.DataFrame, said, method: str = "m", finish="eos") -> pd.DataFrame:
    named = {"prompt_id": prompts["id"], "method": method, "seed": 0}
    return pd.DataFrame({**named, "response": said, "finish": finish})


def test_measures_without_a_judge():
    prompts = pd.DataFrame({"id": ["a", "b"], "text": ["Name two fruits.", "Say a word."]})
    prompts = prompts.assign(label="general", request=prompts["id"])
    answers = answered(prompts, ["apple pear", "no " * 12], finish=["eos", "length"])
    silent = answered(prompts, ["apple", None], "silent")
    answers = pd.concat([answers, silent], ignore_index=True)
    losses = pd.DataFrame({"item": ["a", "b"], "loss": [2.0, 4.0], "tokens": [1, 2]})
    losses = losses.assign(method="m", seed=0)
    table = quality(prompts, answers, losses, EvaluationConfig())
    assert table[table["method"] == "silent"].set_index("measure").loc["words", "value"] == 0.5
    measures = table[table["method"] == "m"].set_index("measure")
    assert measures.loc["words", "value"] == 7 and set(table["n"]) == {2}
    for name in ("degenerate_share", "cut_share"):
        row = measures.loc[name]
        assert row["value"] == 0.5 and 0 < row["low"] < 0.5 < row["high"] < 1
    assert measures.loc["base_perplexity", "value"] == pytest.approx(2.718281828**2)
    assert (
        measures.loc["distinct_1", "value"] == 3 / 14
        and not measures.index.str.contains("win").any()
    )
    assert distinct_n(["a b a b"], 1) == 0.5 and distinct_n(["a b a b"], 2) == pytest.approx(2 / 3)
    with pytest.raises(DCRError, match="no general or seemingly toxic"):
        quality(prompts.assign(label="toxic"), answers, losses, EvaluationConfig())


def test_win_rates_are_asked_about_harmless_prompts_alone(server, tmp_path):
    prompts = pd.DataFrame({"id": ["a", "b", "c"], "text": ["Name a fruit."] * 3})
    prompts = prompts.assign(label=["general", "general", "toxic"], request=prompts["id"])
    answers = pd.concat([answered(prompts, "GOOD"), answered(prompts, "bad", "STL")])
    options = EvaluationConfig(quality_endpoint=url(server), quality_model="judge-1")
    losses = pd.DataFrame({"item": [], "loss": [], "tokens": [], "method": [], "seed": []})
    table = quality(prompts, answers, losses, options, out=tmp_path)
    row = table[table["measure"] == "win rate against STL"].iloc[0]
    assert row["value"] == 1 and 0.3 < row["low"] < 1 and row["wins"] == row["n"] == 2
    assert len(server.seen) == 4


def test_seeds_that_win_differently_widen_the_win_rate():
    hit = np.random.default_rng(0).random((100, 5)) < [0.9, 0.7, 0.5, 0.3, 0.1]
    names = [f"p{i}" for i in range(100)]
    outcome = np.where(hit, "win", "loss")
    tables = [
        pd.DataFrame({"prompt_id": names, "outcome": outcome[:, s], "seed": s}) for s in range(5)
    ]
    table = pd.concat(tables).assign(first="A", second="B", error="")
    found = win_rate(table)
    expected = mean_interval(hit, names, bounds=(0, 1))
    assert [found[k] for k in ("value", "low", "high")] == pytest.approx(expected)
    assert found["low"] < 0.25
    table.loc[table["seed"] == 4, "outcome"] = "unscored"
    assert win_rate(table)["value"] == pytest.approx(hit[:, :4].mean())


def test_bad_input_is_refused():
    with pytest.raises(DCRError, match="'p0' occurs twice"):
        compare_answers(pd.concat([PAIRS, PAIRS]), endpoint="http://x", model="m")
    with pytest.raises(DCRError, match="must both be set"):
        compare_answers(PAIRS, endpoint="", model="m")
