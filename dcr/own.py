"""Your own model and data: refine and align in one call, and export as a plain transformers folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pandas as pd

from dcr.config import Config, load_config
from dcr.data import loaders
from dcr.errors import DCRError
from dcr.store import environment, write_atomic

log = logging.getLogger("dcr")


def align_own(out: str | Path, *, toxic: str, seemingly_toxic: str, general: str, model: str = "embedded",
              refine_first: bool = True, seed: int = 0, overrides: str = "") -> Path:
    """Stage 1 (unless `refine_first` is off) and stage 2 on the user's tables; a plain model folder in `out`.

    toxic and general need `response`; work is kept in `<out>.work`, so an interrupted call goes on.
    Raises DCRError for missing answers, too few prompts, or a folder that holds something already.
    """
    from dcr import models
    from dcr.alignment import align
    from dcr.refinement import refine

    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise DCRError(f"{out} is not empty. Choose a new folder for the model.")
    config: Config = load_config("quick", seed=seed, overrides={"model.name": model}).override(overrides)
    tables = {label: loaders.read_user_table(path, label=label) for label, path in
              (("toxic", toxic), ("seemingly_toxic", seemingly_toxic), ("general", general))}
    for label in ("toxic", "general"):
        empty = tables[label]["response"] == ""
        if empty.any():
            raise DCRError(f"{label} table: row {int(empty.argmax())} has no response; alignment needs an answer (for "
                           "toxic prompts a refusal) in the column 'response'.")
    work = out.with_name(out.name + ".work")
    base, tokenizer = models.load(config.model.name, revision=config.model.revision, dtype=config.model.dtype,
                                  device=config.model.device, chat_template=config.model.chat_template)
    if refine_first:
        base = refine(base, tokenizer, toxic=tables["toxic"], seemingly_toxic=tables["seemingly_toxic"],
                      config=config.refine, seed=seed, work_dir=work / "refine").model
    mix = pd.concat([tables["general"], tables["toxic"]], ignore_index=True)
    aligned = align(base, tokenizer, mix, config=config.align, seed=seed, work_dir=work / "align").model
    return save_plain(aligned, tokenizer, out, facts={"base": model, "refined": refine_first, "config": config.to_dict()})


def refine_own(out: str | Path, *, toxic: str, seemingly_toxic: str, general: str = "", model: str = "embedded", seed: int = 0,
               overrides: str = "") -> Path:
    """Stage 1 alone on the user's tables; a plain model folder in `out`. Many processes may run it together (torchrun).

    Work is kept in `<out>.work`, so an interrupted call goes on. Raises DCRError for a folder that holds something.
    """
    from accelerate import PartialState

    from dcr import models
    from dcr.refinement import refine

    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise DCRError(f"{out} is not empty. Choose a new folder for the model.")
    config: Config = load_config("quick", seed=seed, overrides={"model.name": model, "refine.max_steps": 0}).override(overrides)
    tables = {label: loaders.read_user_table(path, label=label) for label, path in
              (("toxic", toxic), ("seemingly_toxic", seemingly_toxic), ("general", general)) if path}
    base, tokenizer = models.load(config.model.name, revision=config.model.revision, dtype=config.model.dtype,
                                  device=config.model.device, chat_template=config.model.chat_template)
    result = refine(base, tokenizer, **tables, config=config.refine, seed=seed, work_dir=out.with_name(out.name + ".work"),
                    layers_path=config.model.layers_path)
    if PartialState().is_main_process:
        save_plain(result.model, tokenizer, out, facts={"base": model, "method": "contrastive refinement", "config": config.to_dict()})
    return out


def export(experiment, method: str, out: str | Path) -> Path:
    """A method's model as a plain folder: safetensors, tokenizer, chat template, model card."""
    if "steer" in experiment.stages(method) or "rule" in experiment.stages(method):
        raise DCRError(f"{method} steers at inference time and has no weights of its own; export the model it steers (STL).")
    model, tokenizer = experiment.model(method)
    rows = experiment.metric_rows(method)
    headline = rows[rows["metric"].isin(["compliance", "dsr"]) & (rows["form"] == "all")]
    return save_plain(model, tokenizer, Path(out), facts={
        "base": experiment.config.model.name, "method": method, "config": experiment.recipe(method).to_dict(),
        "results": headline[["benchmark", "metric", "value", "low", "high", "n"]].to_dict("records")})


def save_plain(model, tokenizer, out: Path, facts: dict) -> Path:
    """Save an ordinary transformers model with a card; loads with transformers alone."""
    partial = out.with_name(out.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    results = pd.DataFrame(facts.get("results", []))
    card = [f"# {out.name}", "", f"Base model: {facts['base']}. Method: {facts.get('method', 'own data')}.", "",
            "Made for research on over-refusal: a model that refuses harmful requests and answers harmless ones that look "
            "harmful. Not a safety guarantee; judge it on your own prompts before use.", "",
            "Licences: the base model's and those of the training data (see `dcr data list`).", ""]
    if len(results):
        card += ["## Results", "", "| benchmark | metric | value | 95 % interval | n |", "|---|---|---|---|---|"]
        card += [f"| {r.benchmark} | {r.metric} | {r.value:.3f} | {r.low:.3f} to {r.high:.3f} | {r.n} |"
                 for r in results.itertuples()]
    card += ["", "## Parameters", "", "```json", json.dumps(facts["config"], indent=1), "```", "",
             f"Environment: {json.dumps(environment())}"]
    write_atomic(partial / "README.md", "\n".join(card) + "\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return out
