"""Answers from any OpenAI-compatible server (vLLM, TGI, `transformers serve`): same rows as `dcr.lm.generate.generate`.

The key is read from `OPENAI_API_KEY` when a request is made and is written nowhere. A prompt whose request fails after
all retries is left out and counted: judges call it `unscored`, the run goes on, and a later call asks only for those.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from dcr.data.files import append_jsonl
from dcr.errors import DCRError

log = logging.getLogger("dcr")
RETRY_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
GIVE_UP = 10  # failed prompts in a row, with none answered, before the server counts as down


class Endpoint:
    """One served model: chat completions with timeouts, retries and exponential backoff."""

    def __init__(
        self,
        url: str,
        model: str = "",
        *,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
    ) -> None:
        """url: base address such as http://host:8000/v1. model: name at the server ("" asks it for its first one)."""
        import httpx

        if not url.startswith(("http://", "https://")):
            raise DCRError(
                f"generation.endpoint={url!r} is no address; give one such as http://localhost:8000/v1."
            )
        self.url, self.retries, self.backoff = url.rstrip("/"), retries, backoff
        self.client = httpx.Client(timeout=timeout)
        self.model = model or self._first_model()

    def _headers(self) -> dict[str, str]:
        key = os.environ.get("OPENAI_API_KEY", "")
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _first_model(self) -> str:
        try:
            return str(self._request("GET", "/models", None)["data"][0]["id"])
        except (_Failed, KeyError, IndexError, TypeError) as error:
            raise DCRError(
                f"{self.url}: the server did not name a model ({error or type(error).__name__}). Start it, check the "
                "address (it usually ends in /v1), or name the model."
            ) from error

    def chat(self, prompt: str, **options) -> tuple[str, str, int]:
        """(text, finish {eos, length}, tokens) of one user message. options: max_tokens, temperature, seed.

        Raises `_Failed` (a DCRError) with the last reason when every attempt failed.
        """

        def read(content: dict) -> tuple[str, str, int]:
            choice = content["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str):
                raise TypeError("message content is no text")
            used = (content.get("usage") or {}).get("completion_tokens")
            return (
                text.strip(),
                "length" if choice.get("finish_reason") == "length" else "eos",
                int(used or -1),
            )

        return self._request(
            "POST",
            "/chat/completions",
            {"model": self.model, "messages": [{"role": "user", "content": prompt}], **options},
            read,
        )

    def _request(
        self, verb: str, path: str, body: dict | None, read: Callable = lambda content: content
    ):
        import httpx

        problem = "no attempt"
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                answer = self.client.request(
                    verb, self.url + path, json=body, headers=self._headers()
                )
                if answer.status_code in RETRY_STATUS:
                    problem = f"status {answer.status_code}"
                    continue
                if answer.status_code >= 400:
                    raise _Failed(f"status {answer.status_code}")
                return read(answer.json())
            except httpx.TransportError as error:
                problem = type(error).__name__
            except (ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"unreadable reply ({type(error).__name__})"
        raise _Failed(f"{problem} after {self.retries + 1} attempts")


class _Failed(DCRError):
    """A request that failed for good."""


def generate_remote(
    prompts: pd.DataFrame,
    url: str,
    *,
    model: str = "",
    method: str = "",
    seed: int = 0,
    max_new_tokens: int = 24,
    temperature: float = 0.0,
    out: str | Path | None = None,
    concurrency: int = 8,
    timeout: float = 60.0,
    retries: int = 4,
    backoff: float = 1.0,
) -> pd.DataFrame:
    """Answers to a prompt table (columns id, text) from a served model: the rows and columns of `generate`.

    n_tokens is the server's count, -1 where it gives none. With `out` rows are written as they come; a second call asks only
    for what is missing, and one with other parameters is refused. Prompts that failed have no row. Raises DCRError for bad
    tables or parameters, and for a server that answers nothing at all.
    """
    from dcr.lm.generate import COLUMNS, check_request, resume

    check_request(prompts, max_new_tokens, temperature)
    server = Endpoint(url, model, timeout=timeout, retries=retries, backoff=backoff)
    settings = {
        "method": method,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "endpoint": server.url,
        "model": server.model,
    }
    rows = resume(out, settings)
    done = {row["prompt_id"] for row in rows}
    todo = prompts[~prompts["id"].isin(done)]
    failed: dict[str, str] = {}
    down = threading.Event()

    def ask(key: str, text: str) -> dict:
        if down.is_set():
            raise _Failed("not asked: the server is down")
        answer = server.chat(text, max_tokens=max_new_tokens, temperature=temperature, seed=seed)
        return dict(zip(COLUMNS, (key, method, seed, answer[0], answer[2], answer[1]), strict=True))

    with (
        ThreadPoolExecutor(max_workers=concurrency) as pool,
        tqdm(
            total=len(prompts), initial=len(done), unit="prompt", leave=False, desc=f"ask {method}"
        ) as bar,
    ):
        waiting = {
            pool.submit(ask, key, text): key
            for key, text in zip(todo["id"], todo["text"], strict=True)
        }
        for future in as_completed(waiting):
            try:
                rows.append(future.result())
                if out is not None:
                    append_jsonl(Path(out), rows[-1])
            except _Failed as error:
                failed[waiting[future]] = str(error)
                if len(failed) >= GIVE_UP and len(rows) == len(done):
                    down.set()
            bar.update(1)
    if failed:
        key, reason = next(iter(failed.items()))
        log.warning(
            "%s: %d of %d prompts got no answer and stay unscored (%s: %s)",
            server.url,
            len(failed),
            len(prompts),
            key,
            reason,
        )
    if not rows:
        raise DCRError(
            f"{server.url}: none of {len(prompts)} prompts was answered ({next(iter(failed.values()))}). Check the server; "
            "what it answers later is added by calling again."
        )
    log.info(
        "ask %s: %d of %d prompts answered, %d cut at %d tokens",
        method,
        len(rows),
        len(prompts),
        sum(r["finish"] == "length" for r in rows),
        max_new_tokens,
    )
    order = {key: i for i, key in enumerate(prompts["id"])}
    return pd.DataFrame(sorted(rows, key=lambda r: order[r["prompt_id"]]), columns=COLUMNS)
