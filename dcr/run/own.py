"""Your own model and data: refine and align in one call; a method as a transformers folder."""

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dcr.config import AlignConfig, Config
from dcr.data.files import write_atomic, writing
from dcr.data.read import prompts_of
from dcr.data.sets import TrainingSets
from dcr.data.sources import licence_of
from dcr.errors import DCRError
from dcr.run.card import card
from dcr.run.models import TENSORS, Base
from dcr.run.store import Store, is_main
from dcr.run.training import Training
from dcr.steering.hooks import SCRIPT

UNUSED = ("data", "generation", "evaluation", "steering")  # sections that training does not read
STAGES = {"refine": "stage 1", "align": "stage 2", "fit": "anchors"}  # as a card calls them


class OwnData(Training):
    """The training half of a run on the user's tables: one recipe, no method of methods.yaml."""

    def __init__(
        self,
        config: Config,
        store: Store,
        tables: Mapping[str, pd.DataFrame],
        stages: Sequence[str],
    ) -> None:
        super().__init__(config, store, Base(config.model))
        self.tables, self.own_stages = tables, stages

    def entry(self, method: str) -> dict[str, Any]:
        """The one recipe: the configuration as it is."""
        return {"stages": self.own_stages}

    def sets(self, method: str) -> TrainingSets:
        """The user's tables; stage 2's mix is the general and the toxic one, with their answers."""
        parts = {"general": "general", "toxic": "safe"}
        mix = [self.tables[n].assign(part=p) for n, p in parts.items() if n in self.tables]
        toxic, seemingly = self.tables["toxic"], self.tables["seemingly_toxic"]
        general = self.tables.get("general", toxic.iloc[:0])
        return TrainingSets(toxic, seemingly, general, pd.concat(mix, ignore_index=True))


def train_own(  # noqa: PLR0913 (the public call)
    out: str | Path,
    stages: Sequence[str],
    *,
    toxic: Any,
    seemingly_toxic: Any,
    general: Any = None,
    model: str = "embedded",
    seed: int = 0,
    overrides: str | Mapping[str, object] = "",
) -> Path:
    """Stage 1 ("refine"), stage 2 ("align") or both on the user's tables; a plain model folder in
    `out`.

    Tables: paths, frames, lists or hub ids (see `dcr.data.read.prompts_of`); for stage 2, toxic and
    general need answers. Work is kept in `<out>.work`, keyed by data, seed and parameters, so that
    an interrupted call goes on. Under `accelerate launch` each process takes its share. Raises
    DCRError for bad tables or a folder that cannot be written or holds something already.
    """
    given = {"toxic": toxic, "seemingly_toxic": seemingly_toxic}
    if "align" in stages or general is not None:
        given["general"] = general
    out = Path(out).expanduser().absolute()
    check_out(out)
    config = Config(profile="own", seed=seed)  # no profile: profiles carry limits of our runs
    config = config.override({"model.name": model, "align.checkpoints": "last"}).override(overrides)
    check_overrides(config)
    asked = {n: "align" in stages and n != "seemingly_toxic" for n in given}
    tables = {n: prompts_of(t, what=n, label=n, answers=asked[n]) for n, t in given.items()}
    store = Store(out.with_name(out.name + ".work"))
    run = OwnData(config, store, tables, stages)
    if not is_main():  # it trains along; the first process locks, keeps and saves
        run.weights("own")
        return out
    learned = set(run.trained_on("own").get("refine", ()))
    learned |= {"toxic", "general"} if "align" in stages else set()
    data = []
    for name, table in ((n, t) for n, t in given.items() if n in learned):
        source = Path(table).name if isinstance(table, (str, Path)) else name
        rows = len(tables[name])
        data.append({"role": name, "source": source, "rows": rows, "licence": "yours"})
    method = "DCR" if len(stages) == 2 else stages[0]
    facts = {"method": f"{method}, own data", "config": config, "data": data}
    run.base()  # a model that cannot be loaded is told before anything is written
    with writing(out), Store(out.parent).lock(out):
        check_out(out)  # another process may have filled it meanwhile
        save_plain({"": run.model("own")}, out, facts)
        for kind in ("layer", *stages):  # what the user had there stays
            shutil.rmtree(store.root / kind, ignore_errors=True)
        with contextlib.suppress(OSError):
            store.root.rmdir()
    return out


def check_overrides(config: Config) -> None:
    """Raises DCRError for a parameter that says how prompts are drawn, asked or read."""
    plain = Config()
    fields = {s: type(getattr(config, s)).model_fields for s in UNUSED}
    fields["align"] = {f: v for f, v in AlignConfig.model_fields.items() if f.startswith("n_")}
    for section, names in fields.items():
        for name in names:
            if getattr(getattr(config, section), name) != getattr(getattr(plain, section), name):
                raise DCRError(
                    f"{section}.{name} says nothing about training on your own tables, which are "
                    "taken whole. Leave it out."
                )


def export(experiment, method: str, out: str | Path) -> Path:
    """A method (first seed) as a plain folder: safetensors, tokenizer, chat template, model card.

    A steering method comes as the model that it acts on, with `steering.safetensors`, its settings
    and a script that uses them; where another model answers what it lets through, that one lies in
    `answers/`. Raises DCRError for a rule, or a folder that holds something.
    """
    run, out = experiment.first, Path(out).expanduser().absolute()
    if "rule" in run.stages(method):
        raise DCRError(f"{method} is a rule and has no weights; export another method.")
    check_out(out)
    models = {"": run.model(method)}
    facts = {"method": method, "config": run.recipe(method), "data": data_facts(run, method)}
    extra: dict[str, str | bytes] = {}
    if on := run.entry(method).get("answers"):
        models["answers"] = run.model(on)
    if steering := run.steering(method):
        fit = run.fitted(method)
        content = {"kind": run.entry(method)["steering"], **fit.manifest["fit"]}
        extra["steering.json"] = json.dumps(content, indent=1)
        extra["steering.safetensors"] = (fit.path / TENSORS).read_bytes()
        extra["use.py"] = SCRIPT if on else steering.script
    return save_plain(models, out, facts, extra)


def data_facts(run: Training, method: str) -> list[dict]:
    """Role, source, rows and licence of every set a method trained on."""
    facts = [fact for on in run.learns_from(method) for fact in data_facts(run, on)]
    for stage, tables in run.trained_on(method).items():
        for role, rows in tables.items():
            kinds = rows["part"] if stage == "align" else pd.Series(role, rows.index)
            pairs = zip(kinds.str.replace("_", " "), rows["source"], strict=True)
            for (kind, source), n in Counter(pairs).items():
                named = {"role": f"{STAGES[stage]}, {kind}", "source": source, "rows": n}
                facts.append(named | {"licence": licence_of(source)})
    return facts


def check_out(out: Path) -> None:
    """Raises DCRError where no new folder can stand at `out`."""
    if out == Path.cwd() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        what = "is a file" if out.is_file() else "is not empty"
        raise DCRError(f"{out} {what}. Choose a new folder for the model.")
    parent = next(p for p in out.parents if p.exists())
    if not parent.is_dir():
        raise DCRError(f"{out}: {parent} is a file, so nothing can stand below it. Choose another.")
    if not os.access(parent, os.W_OK):
        raise DCRError(f"{out}: {parent} cannot be written. Choose another folder.")


def save_plain(
    models: Mapping[str, tuple[Any, Any]],
    out: Path,
    facts: Mapping[str, Any],
    extra: Mapping[str, str | bytes] = {},
) -> Path:
    """Save models with a card; they load, and stop, with transformers alone.

    models: (model, tokenizer) by the folder in `out` ("": itself); extra: files by name.
    """
    from dcr.lm.chat import stop_tokens

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(out):
            for folder, (model, tokenizer) in models.items():
                model.generation_config.eos_token_id = stop_tokens(model, tokenizer)
                model.config._name_or_path = ""
                model.save_pretrained(partial / folder)
                tokenizer.save_pretrained(partial / folder)
            for name, content in {**extra, "README.md": card(out.name, facts)}.items():
                write_atomic(partial / name, content)
            if out.exists():
                out.rmdir()
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out
