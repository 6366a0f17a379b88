"""General ability through lm-evaluation-harness, and perplexity on held-out general answers, beside the base model.

Tasks are read from the local JSONL files (`general/<task>.jsonl`) where these are at hand, through task files written for
the harness, and from the hub otherwise. What is measured is the harness's own number: the same task files under its own
command line give the same figures.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from dcr.data.fetch import path_of
from dcr.data.files import read_jsonl, write_atomic
from dcr.data.registry import SOURCES
from dcr.errors import DCRError
from dcr.evaluate.metrics import bootstrap_mean

log = logging.getLogger("dcr")
# Local task → its prompt, as the harness's own task files word it (version 0.4.13).
PROMPTS = {
    "arc_easy": "Question: {{question}}\nAnswer:",
    "arc_challenge": "Question: {{question}}\nAnswer:",
    "openbookqa": "{{question}}",
    "piqa": "Question: {{question}}\nAnswer:",
}
TASKS = (*PROMPTS, "mmlu")
METRICS = ("acc", "acc_norm")


def local_file(task: str) -> Path | None:
    """The task's JSONL file when it is at hand, else None."""
    name = task.replace("_", "-")
    if task not in PROMPTS or name not in SOURCES:
        return None
    try:
        return Path(path_of(name, download=False))
    except DCRError:
        return None


def write_task_files(tasks: Sequence[str], folder: str | Path) -> dict[str, str]:
    """Task files of local tasks in `folder`; returns the harness's name of each task (`dcr_arc_easy`, or the hub's `mmlu`).

    Use them under the command line too: `lm_eval --include_path FOLDER --tasks dcr_arc_easy ...`.
    Raises DCRError for a task that is not known.
    """
    names = {}
    for task in tasks:
        if task not in TASKS:
            raise DCRError(f"general-ability task {task!r} is unknown; known: {', '.join(TASKS)}.")
        path = local_file(task)
        names[task] = f"dcr_{task}" if path else task
        if path:
            write_atomic(
                Path(folder) / f"dcr_{task}.yaml",
                yaml.safe_dump(
                    {
                        "task": f"dcr_{task}",
                        "dataset_path": "json",
                        "dataset_kwargs": {"data_files": {"test": str(path.absolute())}},
                        "output_type": "multiple_choice",
                        "test_split": "test",
                        "doc_to_text": PROMPTS[task],
                        "doc_to_target": "{{choices.label.index(answerKey)}}",
                        "doc_to_choice": "{{choices.text}}",
                        "metric_list": [
                            {"metric": m, "aggregation": "mean", "higher_is_better": True}
                            for m in METRICS
                        ],
                        "metadata": {"version": 1.0},
                    },
                    sort_keys=False,
                ),
            )
    return names


def run_harness(
    model,
    tokenizer,
    tasks: Sequence[str],
    *,
    limit: int = 100,
    batch_size: int = 16,
    folder: str | Path,
) -> pd.DataFrame:
    """Rows task, item, metric, hit of lm-evaluation-harness; the first `limit` items a task (0: all), no chat template.

    `folder` receives the task files. Raises DCRError when a task's data is neither at hand nor to be had from the hub.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = write_task_files(tasks, folder)
    wrapped = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device)
    )
    try:
        manager = TaskManager(include_path=str(folder))
        result = simple_evaluate(
            model=wrapped,
            tasks=list(names.values()),
            limit=limit or None,
            bootstrap_iters=0,
            task_manager=manager,
            log_samples=True,
        )
    except (ConnectionError, OSError, FileNotFoundError) as error:
        hub = [t for t, n in names.items() if not n.startswith("dcr_")]
        raise DCRError(
            f"general ability: {', '.join(hub) or 'a task'} could not be loaded ({str(error).splitlines()[0][:160]}). "
            "Put general/<task>.jsonl into DCR_DATA_DIR, go online, or drop the task from "
            "evaluation.capability_tasks."
        ) from error
    rows = []
    for task, name in names.items():
        for sub, samples in result["samples"].items():
            if sub == name or sub.startswith(f"{name}_"):  # mmlu is a group of tasks
                rows += [
                    {"task": task, "item": f"{sub}-{s['doc_id']}", "metric": m, "hit": float(s[m])}
                    for s in samples
                    for m in METRICS
                    if m in s
                ]
    table = pd.DataFrame(rows)
    log.info(
        "general ability: %d items of %d tasks",
        table["item"].nunique() if len(table) else 0,
        len(names),
    )
    return table


@torch.no_grad()
def answer_losses(
    model, tokenizer, prompts: pd.DataFrame, *, batch_size: int = 16, max_length: int = 512
) -> pd.DataFrame:
    """Per prompt: summed negative log likelihood (nats) of `response` after the rendered prompt, and its tokens."""
    from dcr.lm.batches import position_ids, token_batches
    from dcr.lm.chat import encode, render

    rows = prompts[prompts["response"].str.strip() != ""]
    if rows.empty:
        raise DCRError("perplexity: no prompt has a response; give held-out prompts with answers.")
    heads, texts = (
        render(tokenizer, rows["text"].tolist()),
        render(tokenizer, rows["text"].tolist(), rows["response"].tolist()),
    )
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (heads, texts)]
    starts, lengths = [len(r) for r in ids[0]], [len(r) for r in ids[1]]
    device, losses, counts = (
        next(model.parameters()).device,
        np.zeros(len(rows)),
        np.zeros(len(rows), dtype=int),
    )
    for batch in token_batches(lengths, batch_size):
        inputs = encode(
            tokenizer,
            [texts[i] for i in batch],
            padding_side="right",
            max_length=max_length,
            truncate=True,
            device=device,
        )
        logits = (
            model(**inputs, position_ids=position_ids(inputs["attention_mask"]))
            .logits[:, :-1]
            .float()
        )
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), inputs["input_ids"][:, 1:], reduction="none"
        )
        for row, i in enumerate(batch):
            stop = min(lengths[i], max_length) - 1
            losses[i], counts[i] = (
                loss[row, starts[i] - 1 : stop].sum().item(),
                max(0, stop - starts[i] + 1),
            )
    return pd.DataFrame({"item": rows["id"].to_numpy(), "loss": losses, "tokens": counts})


def measure(experiment, method: str) -> pd.DataFrame:
    """Per-item results of one method (task, item, metric, hit; for perplexity: loss and tokens), cached by its weights."""
    tasks, limit = (
        experiment.config.evaluation.capability_tasks,
        experiment.config.evaluation.capability_limit,
    )
    held_out = _held_out(experiment)
    dependencies = {
        "weights": experiment.weights_key(method, -1),
        "tasks": list(tasks),
        "limit": limit,
        "version": 1,
        "held_out": held_out["id"].tolist(),
        "data": {t: _size(t) for t in tasks},
        "model": experiment.config.model.model_dump(),
    }

    def build(folder: Path) -> dict:
        model, tokenizer = experiment.model(method)
        losses = answer_losses(model, tokenizer, held_out).assign(
            task="held-out answers", metric="perplexity"
        )
        parts = [losses]
        if tasks:
            parts.append(run_harness(model, tokenizer, tasks, limit=limit, folder=folder / "tasks"))
        table = pd.concat(parts, ignore_index=True)
        write_atomic(folder / "items.jsonl", table.to_json(orient="records", lines=True))
        return {
            "tasks": list(tasks),
            "limit": limit,
            "chat_template": False,
            "items": len(table),
            "from": {t: "local file" if local_file(t) else "hub" for t in tasks},
        }

    artifact = experiment.store.get("capabilities", method, dependencies, build)
    return pd.DataFrame(read_jsonl(artifact.path / "items.jsonl"))


def _held_out(experiment) -> pd.DataFrame:
    from dcr.data.sets import table

    rows = table("general-test")
    limit = experiment.config.data.limit
    return rows[rows["response"] != ""].head(limit or None)


def _size(task: str) -> int:
    path = local_file(task)
    return path.stat().st_size if path else 0


def ability_rows(
    items: dict[str, pd.DataFrame], against: str = "base", *, n_boot: int = 1000
) -> pd.DataFrame:
    """Rows method, task, metric, value, low, high, change, change_low, change_high, n from per-item results.

    acc and acc_norm: share of items, bootstrap over items; `change` is paired, item by item, with `against`.
    perplexity: exp of the mean loss per token over all answers; `change` is the ratio to `against`'s, also drawn in pairs.
    Raises DCRError when `against` is missing or methods were measured on different items.
    """
    if against not in items:
        raise DCRError(
            f"general ability: no results of {against!r} to compare with; measured: {', '.join(items)}."
        )
    rows = []
    for method, table in items.items():
        for (task, metric), part in table.groupby(["task", "metric"], sort=False):
            base = items[against][
                (items[against]["task"] == task) & (items[against]["metric"] == metric)
            ]
            both = part.merge(base, on="item", suffixes=("", "_base"), how="outer", indicator=True)
            if (both["_merge"] != "both").any():
                raise DCRError(
                    f"general ability of {method}: {task} was measured on other items than {against}'s; measure both "
                    "with the same limit."
                )
            values = (
                _perplexity(both, n_boot) if metric == "perplexity" else _accuracy(both, n_boot)
            )
            rows.append(
                {"method": method, "task": task, "metric": metric, **values, "n": len(both)}
            )
    return pd.DataFrame(rows)


def _accuracy(both: pd.DataFrame, n_boot: int) -> dict[str, float]:
    value = bootstrap_mean(both["hit"], n_boot=n_boot)
    change = bootstrap_mean(both["hit"] - both["hit_base"], n_boot=n_boot)
    return dict(
        zip(
            ("value", "low", "high", "change", "change_low", "change_high"),
            (*value, *change),
            strict=True,
        )
    )


def _perplexity(both: pd.DataFrame, n_boot: int) -> dict[str, float]:
    draws = np.random.default_rng([0, 0xBE2]).integers(len(both), size=(n_boot, len(both)))
    mine, base, tokens = (both[c].to_numpy(float) for c in ("loss", "loss_base", "tokens"))
    per_token = [
        mine[draws].sum(1) / tokens[draws].sum(1),
        (mine - base)[draws].sum(1) / tokens[draws].sum(1),
    ]
    (low, high), (change_low, change_high) = (
        np.exp(np.quantile(d, [0.025, 0.975])) for d in per_token
    )
    return {
        "value": math.exp(mine.sum() / tokens.sum()),
        "low": low,
        "high": high,
        "change": math.exp((mine - base).sum() / tokens.sum()),
        "change_low": change_low,
        "change_high": change_high,
    }


def capability_table(experiment, against: str = "base") -> pd.DataFrame:
    """General ability of every method that has weights of its own, and its change from `against`, item by item.

    Written to capabilities.csv (`against` the base model) or capabilities_<against>.csv. A method that steers at
    inference has the weights of the model it steers and is left out (said in the log).
    """
    mine = [m for m in experiment.methods if "steer" not in experiment.stages(m)]
    if left := [m for m in experiment.methods if m not in mine]:
        log.info(
            "general ability: %s left out, they steer another method's weights", ", ".join(left)
        )
    items = {m: measure(experiment, m) for m in dict.fromkeys(("base", *mine))}
    table = ability_rows(items, against, n_boot=experiment.config.evaluation.bootstrap)
    name = "capabilities" if against == "base" else f"capabilities_{against}"
    experiment.write_table(
        name, table.assign(profile=experiment.config.profile, seed=experiment.config.seed)
    )
    return table


def harness_numbers(results_file: str | Path) -> dict[str, float]:
    """{"dcr_arc_easy acc": 0.5, ...} from the JSON that the harness's command line wrote."""
    content = json.loads(Path(results_file).read_text(encoding="utf-8"))["results"]
    return {
        f"{task} {m}": content[task][f"{m},none"]
        for task in content
        for m in METRICS
        if f"{m},none" in content[task]
    }
