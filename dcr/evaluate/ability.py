"""General ability through lm-evaluation-harness, and perplexity on held-out general answers.

Tasks are read from local files where these are at hand, through task files written for the harness,
and from the hub otherwise. The numbers are the harness's own: its command line gives the same on
these files.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from dcr.config import EvaluationConfig
from dcr.data.files import sha256_of, write_atomic
from dcr.data.sources import path_of
from dcr.errors import DCRError
from dcr.evaluate.cells import aligned, same_seeds
from dcr.evaluate.intervals import N_BOOT, SHARE, SIGNED, interval, request_weights
from dcr.lm.batches import padded, position_ids, token_batches
from dcr.lm.chat import encode_examples

log = logging.getLogger("dcr")
# Task: its prompt, as the harness's own task files word it (version 0.4.13).
PROMPTS = {
    "arc_easy": "Question: {{question}}\nAnswer:",
    "arc_challenge": "Question: {{question}}\nAnswer:",
    "openbookqa": "{{question}}",
    "piqa": "Question: {{question}}\nAnswer:",
}
TASKS = (*PROMPTS, "mmlu")
METRICS = ("acc", "acc_norm")
PERPLEXITY = ("held-out answers", "perplexity")


def local_file(task: str) -> Path | None:
    """The task's file when it is at hand, else None (the hub's is taken)."""
    try:
        return path_of(task.replace("_", "-"), download=False) if task in PROMPTS else None
    except DCRError:
        return None


def task_facts(options: EvaluationConfig) -> dict[str, str]:
    """{task: checksum of its local file, or "hub"}, for cache keys and manifests."""
    files = {task: local_file(task) for task in options.capability_tasks}
    return {task: sha256_of(path) if path else "hub" for task, path in files.items()}


def write_task_files(tasks: Sequence[str], folder: str | Path) -> dict[str, str]:
    """Task files of local tasks in `folder`; returns the harness's name of each task.

    They serve its command line too: `lm_eval --include_path FOLDER --tasks dcr_arc_easy ...`.
    Raises DCRError for a task that is not known.
    """
    names = {}
    for task in tasks:
        if task not in TASKS:
            raise DCRError(f"general-ability task {task!r} is unknown; known: {', '.join(TASKS)}.")
        path = local_file(task)
        names[task] = f"dcr_{task}" if path else task
        if path:
            mean = {"aggregation": "mean", "higher_is_better": True}
            content = {
                "task": f"dcr_{task}",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(path.absolute())}},
                "output_type": "multiple_choice",
                "test_split": "test",
                "doc_to_text": PROMPTS[task],
                "doc_to_target": "{{choices.label.index(answerKey)}}",
                "doc_to_choice": "{{choices.text}}",
                "metric_list": [{"metric": m, **mean} for m in METRICS],
                "metadata": {"version": 1.0},
            }
            target = Path(folder) / f"dcr_{task}.yaml"
            write_atomic(target, yaml.safe_dump(content, sort_keys=False))
    return names


def run_harness(
    model, tokenizer, tasks: Sequence[str], *, limit: int = 100, folder: str | Path
) -> pd.DataFrame:
    """Rows task, item, metric, hit; the first `limit` items a task (0: all), no chat template.

    `folder` receives the task files. Raises DCRError when a task's data are not to be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = write_task_files(tasks, folder)
    try:
        result = simple_evaluate(
            model=HFLM(model, tokenizer=tokenizer, batch_size=16, device=str(model.device)),
            tasks=list(names.values()),
            limit=limit or None,
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(folder)),
            log_samples=True,
        )
    except OSError as error:  # no connection, no file
        hub = [t for t, n in names.items() if not n.startswith("dcr_")]
        raise DCRError(
            f"general ability: {', '.join(hub) or 'a task'} could not be loaded "
            f"({str(error).splitlines()[0][:160]}). Put general/<task>.jsonl into DCR_DATA_DIR, go "
            "online, or drop the task from evaluation.capability_tasks."
        ) from error
    rows = [
        {"task": task, "item": f"{sub}-{s['doc_id']}", "metric": m, "hit": float(s[m])}
        for task, name in names.items()
        for sub, samples in result["samples"].items()
        if sub == name or sub.startswith(f"{name}_")  # mmlu is a group of tasks
        for s in samples
        for m in METRICS
        if m in s
    ]
    return pd.DataFrame(rows, columns=["task", "item", "metric", "hit"])


@torch.no_grad()
def answer_losses(
    model, tokenizer, prompts: pd.DataFrame, *, max_length: int = 512, max_tokens: int = 8192
) -> pd.DataFrame:
    """item, loss, tokens: negative log likelihood (nats, summed) of each `response` to its prompt.

    Prompts without a response are left out; an answer ends at `max_length` tokens of its row.
    """
    rows = prompts[prompts["response"].fillna("").str.strip() != ""]
    if rows.empty:
        raise DCRError("perplexity: no prompt has a response; give held-out prompts with answers.")
    ids, starts = encode_examples(tokenizer, rows["text"].tolist(), rows["response"].tolist())
    ids = [row[:max_length] for row in ids]
    losses, counts = np.zeros(len(rows)), np.zeros(len(rows), dtype=int)
    for batch in token_batches([len(row) for row in ids], max_tokens=max_tokens):
        tokens, mask = padded([ids[i] for i in batch], "right", model.device)
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": position_ids(mask)}
        logits = model(**inputs).logits[:, :-1].float()  # [batch, seq - 1, vocabulary]
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        for row, i in enumerate(batch):
            answer = loss[row, starts[i] - 1 : len(ids[i]) - 1]
            losses[i], counts[i] = answer.sum().item(), len(answer)
    return pd.DataFrame({"item": rows["id"].to_numpy(), "loss": losses, "tokens": counts})


def measure_items(
    model, tokenizer, held_out: pd.DataFrame, options: EvaluationConfig, *, folder: str | Path
) -> pd.DataFrame:
    """Per-item results of one model: task, item, metric, hit (loss and tokens for perplexity)."""
    task, metric = PERPLEXITY
    parts = []
    if len(held_out):
        losses = answer_losses(model, tokenizer, held_out)
        parts.append(losses.assign(task=task, metric=metric))
    if tasks := options.capability_tasks:
        limit, place = options.capability_limit, Path(folder) / "tasks"
        parts.append(run_harness(model, tokenizer, tasks, limit=limit, folder=place))
    if not parts:
        raise DCRError(
            "general ability: no held-out answers and no evaluation.capability_tasks; name one."
        )
    return pd.concat(parts, ignore_index=True)


def ability_rows(
    items: pd.DataFrame, against: str = "base", *, n_boot: int = N_BOOT
) -> pd.DataFrame:
    """method, task, metric, value, low, high, change, change_low, change_high, n, seeds.

    items: `measure_items` of each method and seed (columns method, seed). acc, acc_norm: share of
    items; `change` is paired with `against`, item by item. perplexity: exp of the mean loss a
    token; `change` is the ratio to `against`'s. Raises DCRError when methods were measured on
    different items.
    """
    if against not in set(items["method"]):
        raise DCRError(
            f"general ability: no results of {against!r} to compare with; measured: "
            f"{', '.join(items['method'].unique())}."
        )
    rows = []
    for (task, metric), part in items.groupby(["task", "metric"], sort=False):
        names = part["item"].drop_duplicates()
        frame, table = pd.DataFrame({"id": names}), part.rename(columns={"item": "prompt_id"})
        text = metric == PERPLEXITY[1]
        values = aligned(frame, table, "loss" if text else "hit", ("id",))
        requests = names.astype(str).str.rstrip("~")  # both forms of a request are drawn together
        weights = request_weights(requests, n_boot)
        tokens = part.drop_duplicates("item")["tokens"].to_numpy() if text else np.ones(len(names))
        total = (weights @ tokens)[:, None]
        if against not in values:
            raise DCRError(f"general ability: {task} was not measured for {against!r}; measure it.")
        for method, (seeds, mine) in values.items():
            a, b = same_seeds(values, method, against)
            signed = SIGNED if method != against else None
            row = {"method": method, "task": task, "metric": metric}
            for ends, each, bounds in (
                (("value", "low", "high"), mine, SHARE),
                (("change", "change_low", "change_high"), a - b, signed),
            ):
                draws = weights @ each.astype(float) / total
                found = interval(draws, len(names), None if text else bounds)
                read = (found[end] for end in ("value", "low", "high"))
                row |= {k: float(np.exp(v) if text else v) for k, v in zip(ends, read, strict=True)}
            rows.append({**row, "n": len(names), "seeds": len(seeds)})
    return pd.DataFrame(rows)
