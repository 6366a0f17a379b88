"""Your own model and data: refine and align in one call, and export as a plain transformers folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pandas as pd
from safetensors import SafetensorError

from dcr.config import Config
from dcr.data import loaders
from dcr.data.files import write_atomic
from dcr.errors import DCRError
from dcr.run.store import Store, environment


def align_own(
    out: str | Path,
    *,
    toxic: str,
    seemingly_toxic: str,
    general: str,
    model: str = "embedded",
    refine_first: bool = True,
    seed: int = 0,
    overrides: str = "",
) -> Path:
    """Stage 1 (unless `refine_first` is off) and stage 2 on the user's tables; a plain model folder in `out`.

    toxic and general need `response`; work is kept in `<out>.work`, so an interrupted call goes on. A second call for
    the same folder waits for the first and says who holds it. Under `accelerate launch` each process takes its share.
    Raises DCRError for missing answers, too few prompts, or a folder that holds something already.
    """
    out = Path(out)
    if int(
        os.environ.get("RANK", 0)
    ):  # a helper process trains along; the first one locks and saves
        _train_own(out, toxic, seemingly_toxic, general, model, refine_first, seed, overrides)
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with Store(out.parent).lock(out):
        if out.exists() and any(out.iterdir()):
            raise DCRError(f"{out} is not empty. Choose a new folder for the model.")
        aligned, tokenizer, facts = _train_own(
            out, toxic, seemingly_toxic, general, model, refine_first, seed, overrides
        )
        return save_plain(aligned, tokenizer, out, facts=facts)


def own_config(model: str, seed: int, overrides: str) -> Config:
    """The package's defaults for the user's own data (no profile: profiles carry step limits of our runs)."""
    return (
        Config(profile="own", seed=seed)
        .override({"model.name": model, "align.checkpoints": "last"})
        .override(overrides)
    )


def _train_own(
    out: Path,
    toxic: str,
    seemingly_toxic: str,
    general: str,
    model: str,
    refine_first: bool,
    seed: int,
    overrides: str,
):
    """(aligned model, tokenizer, facts for the card)."""
    from dcr.lm import load as models
    from dcr.train.align import align
    from dcr.train.refine import refine

    config = own_config(model, seed, overrides)
    tables = {
        label: loaders.read_user_table(path, label=label)
        for label, path in (
            ("toxic", toxic),
            ("seemingly_toxic", seemingly_toxic),
            ("general", general),
        )
    }
    for label in ("toxic", "general"):
        empty = tables[label]["response"] == ""
        if empty.any():
            raise DCRError(
                f"{label} table: row {int(empty.argmax())} has no response; alignment needs an answer (for "
                "toxic prompts a refusal) in the column 'response'."
            )
    work = out.with_name(out.name + ".work")
    base, tokenizer = models.load(
        config.model.name,
        revision=config.model.revision,
        device=config.model.device,
        chat_template=config.model.chat_template,
    )
    if refine_first:
        base = refine(
            base,
            tokenizer,
            toxic=tables["toxic"],
            seemingly_toxic=tables["seemingly_toxic"],
            config=config.refine,
            seed=seed,
            work_dir=work / "refine",
            precision=config.model.precision,
            layers_path=config.model.layers_path,
        ).model
    mix = pd.concat([tables["general"], tables["toxic"]], ignore_index=True)
    result = align(
        base,
        tokenizer,
        mix,
        config=config.align,
        seed=seed,
        work_dir=work / "align",
        precision=config.model.precision,
        layers_path=config.model.layers_path,
    )
    data = _data({"toxic": toxic, "seemingly_toxic": seemingly_toxic, "general": general}, tables)
    return (
        result.model,
        tokenizer,
        {
            "base": model,
            "method": "DCR, own data" if refine_first else "STL, own data",
            "config": config.to_dict(),
            "data": data,
            "truncated": result.truncated,
        },
    )


def _data(paths: dict[str, str], tables: dict[str, pd.DataFrame]) -> list[dict]:
    """The card's rows of the user's tables."""
    return [
        {"role": label, "source": Path(paths[label]).name, "rows": len(rows), "licence": "yours"}
        for label, rows in tables.items()
    ]


def refine_own(
    out: str | Path,
    *,
    toxic: str,
    seemingly_toxic: str,
    general: str = "",
    model: str = "embedded",
    seed: int = 0,
    overrides: str = "",
) -> Path:
    """Stage 1 alone on the user's tables; a plain model folder in `out`. Many processes may run it together (accelerate launch).

    Work is kept in `<out>.work`, so an interrupted call goes on. Raises DCRError for a folder that holds something.
    """
    from accelerate import PartialState

    from dcr.lm import load as models
    from dcr.train.refine import refine

    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise DCRError(f"{out} is not empty. Choose a new folder for the model.")
    config = own_config(model, seed, overrides)
    tables = {
        label: loaders.read_user_table(path, label=label)
        for label, path in (
            ("toxic", toxic),
            ("seemingly_toxic", seemingly_toxic),
            ("general", general),
        )
        if path
    }
    base, tokenizer = models.load(
        config.model.name,
        revision=config.model.revision,
        device=config.model.device,
        chat_template=config.model.chat_template,
    )
    result = refine(
        base,
        tokenizer,
        **tables,
        config=config.refine,
        seed=seed,
        work_dir=out.with_name(out.name + ".work"),
        precision=config.model.precision,
        layers_path=config.model.layers_path,
    )
    if PartialState().is_main_process:
        save_plain(
            result.model,
            tokenizer,
            out,
            facts={
                "base": model,
                "method": "contrastive refinement",
                "config": config.to_dict(),
                "data": _data(
                    {"toxic": toxic, "seemingly_toxic": seemingly_toxic, "general": general}, tables
                ),
            },
        )
    return out


def export(experiment, method: str, out: str | Path) -> Path:
    """A method's model as a plain folder: safetensors, tokenizer, chat template, model card.

    Raises DCRError for a method without weights of its own, or a folder that holds something already.
    """
    if "steer" in experiment.stages(method) or "rule" in experiment.stages(method):
        raise DCRError(
            f"{method} steers at inference time and has no weights of its own; export the model it steers (STL)."
        )
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise DCRError(f"{out} is not empty. Choose a new folder for the model.")
    model, tokenizer = experiment.model(method)
    rows = experiment.metric_rows(method)
    headline = rows[rows["metric"].isin(["compliance", "dsr"]) & (rows["form"] == "all")]
    return save_plain(
        model,
        tokenizer,
        out,
        facts={
            "base": experiment.config.model.name,
            "method": method,
            "config": experiment.recipe(method).to_dict(),
            "data": data_facts(experiment, method),
            "results": headline[
                ["benchmark", "metric", "value", "low", "high", "n", "judge", "in_distribution"]
            ].to_dict("records"),
        },
    )


def data_facts(experiment, method: str) -> list[dict]:
    """Role, source, rows and licence of every set a method trained on."""
    from dcr.data.registry import SOURCES

    stages, tables = experiment.stages(method), []
    toxic, seemingly, _, mix = experiment.training_sets(method)
    if "refine" in stages:
        tables += [("stage 1, toxic", toxic), ("stage 1, seemingly toxic", seemingly)]
    if "align" in stages:
        tables += [(f"stage 2, {role}", rows) for role, rows in mix.groupby("role", sort=False)]
    licences = {name: entry.licence for name, entry in SOURCES.items()} | {
        "xstest": SOURCES["xstest-safe"].licence
    }
    return [
        {
            "role": role,
            "source": source,
            "rows": len(part),
            "licence": licences.get(
                source, "Apache-2.0 (this kit)" if source.startswith("dcr-") else "see its owner"
            ),
        }
        for role, rows in tables
        for source, part in rows.groupby("source", sort=False)
    ]


def save_plain(model, tokenizer, out: Path, facts: dict) -> Path:
    """Save an ordinary transformers model with a card; loads with transformers alone."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_atomic(partial / "README.md", card(out.name, facts))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise DCRError(
            f"{out}: could not be written ({error}). Free space or choose another folder."
        ) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return out


def card(name: str, facts: dict) -> str:
    """The model card in Markdown: data, parameters, results, licences, intended use. Numbers come from `facts` alone."""
    base = "SmolLM2-135M-Instruct (Apache-2.0)" if facts["base"] == "embedded" else facts["base"]
    lines = [
        f"# {name}",
        "",
        f"Base model: {base}. Method: {facts['method']}.",
        "",
        "## Intended use",
        "",
        "Research on over-refusal: a model that is to refuse harmful requests and answer harmless ones that look harmful. "
        "Not a safety guarantee and not for deployment as it is; judge it on your own prompts before any use.",
        "",
        "Load it with `transformers.AutoModelForCausalLM.from_pretrained`; the chat template is in the tokenizer.",
        "",
        "## Data",
        "",
        "| role | source | rows | licence |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {d['role']} | {d['source']} | {d['rows']} | {d['licence']} |" for d in facts["data"]
    ]
    if facts.get("truncated"):
        lines += ["", f"{facts['truncated']} answers were cut at the length limit."]
    lines += [
        "",
        "## Licences",
        "",
        "The base model's licence holds for these weights; the data's licences are in the table above. "
        "A non-commercial licence there (CC-BY-NC) binds what is made from it.",
    ]
    if facts.get("results"):
        lines += [
            "",
            "## Results",
            "",
            "| benchmark | metric | value | 95 % interval | n | judge | trained on its source |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['benchmark']} | {r['metric']} | {r['value']:.3f} | {r['low']:.3f} to {r['high']:.3f} | {r['n']} | "
            f"{r['judge']} | {'yes' if r['in_distribution'] else 'no'} |"
            for r in facts["results"]
        ]
    lines += [
        "",
        "## Parameters",
        "",
        "```json",
        json.dumps(facts["config"], indent=1),
        "```",
        "",
        f"Environment: {json.dumps(environment())}",
    ]
    return "\n".join(lines) + "\n"
