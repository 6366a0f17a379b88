"""Answers from any OpenAI-compatible server (vLLM, TGI, `transformers serve`).

The key is read from `OPENAI_API_KEY` and is written nowhere. A prompt whose request fails after all
retries is left out and counted: judges call it `unscored`, the run goes on, and a later call asks
only for those.
"""

import functools
import logging
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pandas as pd
from openai import APIStatusError, OpenAI, OpenAIError
from pydantic import HttpUrl, TypeAdapter, ValidationError

from dcr.config import GenerationConfig
from dcr.data.read import prompts_of
from dcr.errors import DCRError
from dcr.lm.chat import strip_thinking
from dcr.lm.generate import Answers

log = logging.getLogger("dcr")
# What a request raises that fails, and what a reply of no use does.
FAILURES = (OpenAIError, ValueError, LookupError, TypeError, AttributeError)
GIVE_UP = 10  # failed prompts in a row, with none answered, before the server counts as down


class Failed(DCRError):
    """A request that failed for good."""


class Endpoint:
    """One served model: chat completions with a time limit; the client retries with backoff."""

    def __init__(
        self,
        url: str,
        model: str = "",
        *,
        timeout: float = 60.0,
        retries: int = 4,
        key: str = "OPENAI_API_KEY",
    ) -> None:
        """url: base address, as http://host:8000/v1. model: name there ("" asks for the first).

        key: the variable of the environment that holds the server's key.
        """
        try:
            TypeAdapter(HttpUrl).validate_python(url)
        except ValidationError as error:
            raise DCRError(
                f"endpoint {url!r} is no address; give one such as http://localhost:8000/v1."
            ) from error
        self.url, self.retries = url.rstrip("/"), retries
        self.key = os.environ.get(key, "")
        options: Any = {"api_key": self.key or "none", "timeout": timeout, "max_retries": retries}
        try:
            self.client = OpenAI(base_url=url, **options)
            self.model = model or self.client.models.list().data[0].id
        except FAILURES as error:
            raise DCRError(
                f"{self.url}: the server did not name a model ({self._reason(error)}). Start it, "
                "check the address (it usually ends in /v1), or name the model."
            ) from error

    def chat(self, prompt: str, **options) -> tuple[str, str, int]:
        """(text, finish {eos, length}, tokens or -1) of one user message.

        options: max_tokens, temperature, seed. Raises `Failed` with the server's own last word when
        every attempt failed.
        """
        attempt = 0
        while True:
            try:
                reply = self.client.chat.completions.create(
                    model=self.model, messages=[{"role": "user", "content": prompt}], **options
                )
                choice = reply.choices[0]
                finish = "length" if choice.finish_reason == "length" else "eos"
                used = reply.usage.completion_tokens if reply.usage else -1
                return _said(choice.message), finish, used
            except FAILURES as error:
                if isinstance(error, OpenAIError) or attempt == self.retries:
                    raise Failed(self._reason(error)) from error
                attempt += 1  # the client repeats requests that fail, not replies of no use

    def _reason(self, error: Exception) -> str:
        if not isinstance(error, APIStatusError):
            return f"{type(error).__name__} after {self.retries + 1} attempts"
        body = error.body.get("message") if isinstance(error.body, dict) else error.body
        said = str(body or "").strip()[:300]
        said = said.replace(self.key, "***") if self.key else said
        return f"status {error.status_code}" + (f": {said}" if said else "")


def _said(message) -> str:
    """Text of a message: its content, whole or in parts, or the refusal in its place."""
    parts = message.content or getattr(message, "refusal", None) or message.content
    if isinstance(parts, list):
        known = [p if isinstance(p, dict) else vars(p) for p in parts]
        parts = "".join(p.get("text") or p.get("refusal") or "" for p in known)
    if not isinstance(parts, str):
        raise TypeError("message content is no text")
    return strip_thinking(parts.encode("utf-8", "replace").decode())  # no half characters


def generate_remote(  # noqa: PLR0913
    prompts,
    options: GenerationConfig,
    *,
    served: str = "",
    method: str = "",
    seed: int = 0,
    out: str | Path | None = None,
    server: Endpoint | None = None,
    concurrency: int = 8,
) -> pd.DataFrame:
    """Answers to prompts (texts, or a prompt table) from a served model, as `generate` gives them.

    options: endpoint, max_new_tokens, temperature. served: the model's name at the server. n_tokens
    is the server's count, -1 where it gives none. `out` as in `generate`. Prompts that failed have
    no row. Raises DCRError for bad prompts or parameters, and for a server that answers nothing.
    """
    prompts = prompts_of(prompts)
    server = server or Endpoint(options.endpoint, served)
    sampling: dict[str, Any] = {"temperature": options.temperature, "seed": seed}
    settings = {"method": method, "max_new_tokens": options.max_new_tokens, **sampling}
    settings |= {"endpoint": server.url, "model": server.model}
    answers = Answers(prompts, {"method": method, "seed": seed}, settings, out)
    before, failed = len(answers.rows), {}
    ask = functools.partial(server.chat, max_tokens=options.max_new_tokens, **sampling)
    with ThreadPoolExecutor(max_workers=concurrency) as pool:
        waiting = {pool.submit(ask, text): i for i, text in enumerate(answers.todo["text"])}
        try:
            for future in as_completed(waiting):
                i = waiting[future]
                try:
                    text, finish, used = future.result()
                    answers.add(i, text, used, finish == "eos")
                except Failed as error:
                    failed[answers.todo["id"][i]] = str(error)
                    if len(failed) >= GIVE_UP and len(answers.rows) == before:
                        break
        finally:  # stopped: nothing more is asked
            pool.shutdown(wait=False, cancel_futures=True)
    for key, reason in list(failed.items())[:1]:
        lacking = len(prompts) - len(answers.rows)
        log.warning(
            "%s: %d of %d prompts got no answer and stay unscored (%s: %s)",
            *(server.url, lacking, len(prompts), key, reason),
        )
    if not answers.rows:
        raise DCRError(
            f"{server.url}: none of {len(prompts)} prompts was answered "
            f"({next(iter(failed.values()))}). Check the server; what it answers later is added by "
            "calling again."
        )
    return answers.frame()
