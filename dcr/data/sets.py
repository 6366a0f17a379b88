"""What each stage and each question sees: prompts drawn from the ledger, the same way for every method.

`of` is everywhere as for `ledger`: an experiment gives its own configuration, so that its recipes share one ledger.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dcr.config import Config
from dcr.data import legacy
from dcr.data.forms import swap_table
from dcr.data.ledger import ANCHORS, BUNDLED_SETS, hash_of, ledger, names_in
from dcr.data.legacy import (  # noqa: F401  until its callers have switched
    BUNDLED_BENCHMARKS,
    alignment_mix,
    benchmark,
    benchmarks_of,
    contrastive_sets,
    general_prompts,
    leakage,
    load_sets,
    sources_of,
    table,
)
from dcr.data.sources import SOURCES, audit
from dcr.errors import DCRError

log = logging.getLogger("dcr")
_bundled, _bundled_half, _general = legacy._bundled, legacy._bundled_half, legacy._general
PLAIN_REFUSAL = "I'm sorry, but I can't help with that."  # for toxic prompts without an answer
TRAINING = ("refine", "align", "anchor")
GENERAL = 128  # general prompts of stage 1 (harmless class, retention)
LABEL_OF = {"harmful": "toxic", "pseudo": "seemingly_toxic", "harmless": "general"}
SIDES = {"toxic": "toxic", "seemingly_toxic": "safe", "general": "general"}


@dataclass(frozen=True)
class TrainingSets:
    """Prompt tables of one recipe. `mix` has a column `part`: general, safe (toxic prompt, refusal) or augment."""

    toxic: pd.DataFrame  # stage 1
    seemingly_toxic: pd.DataFrame  # stage 1
    general: pd.DataFrame  # stage 1: joined to the harmless class, or held by retention
    mix: pd.DataFrame  # stage 2


def training_sets(config: Config, of: Sequence[Config] = ()) -> TrainingSets:
    """What a recipe trains on.

    Prompts are ranked by sha256(seed:request) and the first n taken; only then does an audit filter them, so
    that an audited set is a part of the other. Raises DCRError where n exceeds what there is.
    """
    data, every = config.data, ledger(config, of)
    sizes = {"toxic": data.n_toxic, "seemingly_toxic": data.n_seemingly_toxic}
    if data.toxic == data.seemingly_toxic == "bundled":  # both members of a pair
        least = min(filter(None, sizes.values()), default=0)
        sizes = {label: least for label in sizes}
    stage_one = [
        _drawn(_rows(every, getattr(data, label), "refine", label), n, config, data.form_mix)
        for label, n in sizes.items()
    ]
    general = _drawn(_rows(every, "bundled", "refine", "general"), GENERAL, config, 0)
    return TrainingSets(*stage_one, general, _mix(config, every))


def _mix(config: Config, every: pd.DataFrame) -> pd.DataFrame:
    data, align = config.data, config.align
    extra = "bundled" if align.augment_source == "pairs" else align.augment_source
    parts = []
    for part, setting, label, n in (
        ("general", data.general, "general", align.n_general),
        ("safe", data.align_toxic, "toxic", align.n_safe),
        ("augment", extra, "seemingly_toxic", align.n_augment),
    ):
        if not n:
            continue
        rows = _rows(every, setting, "align", label)
        bare = rows["response"] == ""
        if part == "safe" and bare.any():
            log.info(
                "alignment mix: %d of %d toxic prompts have no answer; they are refused with %r",
                bare.sum(),
                len(rows),
                PLAIN_REFUSAL,
            )
            rows = rows.assign(response=rows["response"].mask(bare, PLAIN_REFUSAL))
        rows = rows[rows["response"] != ""]
        if n > len(rows) and part != "augment":
            raise DCRError(
                f"align.n_{part}={n}, but {setting} has only {len(rows)} prompts for alignment. Lower align.n_{part} "
                "or name a larger source."
            )
        if n > len(rows):
            log.warning("align.n_augment=%d, but %d are at hand: all are taken", n, len(rows))
        parts.append(_drawn(rows, n, config, align.form_mix).assign(part=part))
    if not parts:
        raise DCRError(
            "the alignment mix is empty: set align.n_general, align.n_safe or align.n_augment above 0."
        )
    return pd.concat(parts, ignore_index=True)


def _rows(every: pd.DataFrame, setting: str, role: str, label: str = "") -> pd.DataFrame:
    """The ledger's rows of one setting ("safety-only+bundled") that play a role, of one class."""
    parts = []
    for name in names_in(setting):
        if name in BUNDLED_SETS:
            _, split, its = BUNDLED_SETS[name]
            mine = (
                (every["table"] == "bundled") & (every["split"] == split) & (every["label"] == its)
            )
        else:
            mine = every["table"] == name
        parts.append(every[mine])
    rows = pd.concat(parts, ignore_index=True)
    return rows[(rows["role"] == role) & rows["label"].isin([label] if label else SIDES)]


def _drawn(rows: pd.DataFrame, n: int, config: Config, share: float) -> pd.DataFrame:
    """The first n rows (0: all) in the order of the seed's hash, `share` of them form-swapped, then audited."""
    order = rows["request"].map(lambda request: hash_of(f"{config.seed}:{request}"))
    rows = rows.assign(_order=order).sort_values(["_order", "id"]).drop(columns="_order")
    rows = mixed_forms(rows.head(n or len(rows)).reset_index(drop=True), share)
    if config.data.audited:
        marks = rows["id"].str.rstrip("~").map(audit()).fillna("harmful")
        rows = rows[marks == "harmful"].reset_index(drop=True)
    return rows


def mixed_forms(rows: pd.DataFrame, share: float) -> pd.DataFrame:
    """The rows with `share` of them in the other form (question ⇄ imperative), evenly along the table; ids get "~"."""
    if not 0 <= share <= 1:
        raise DCRError(f"share of swapped forms is {share}; give 0 to 1.")
    chosen = pd.Series(
        [int((i + 1) * share) > int(i * share) for i in range(len(rows))], rows.index, bool
    )
    return pd.concat([rows[~chosen], swap_table(rows[chosen])]).sort_index() if share else rows


# ---- what is asked ---------------------------------------------------------------------------------------------


def test_prompts(config: Config, of: Sequence[Config] = ()) -> pd.DataFrame:
    """Every test prompt of `data.benchmarks`, with `benchmark`, `version` {published, swapped} and `met`.

    The same for every method and seed. `role` is "test", but for a set that is trained on (XSTest): it keeps its
    role, stands apart and enters no average. met: its source serves training or anchors too.
    """
    return _asked(config, config.data.benchmarks, "test", of)


def validation_prompts(config: Config, of: Sequence[Config] = ()) -> pd.DataFrame:
    """Every prompt on which thresholds and recipes are chosen (`data.validation`); columns as `test_prompts`."""
    return _asked(config, config.data.validation, "validation", of)


def _asked(config: Config, names: Sequence[str], role: str, of: Sequence[Config]) -> pd.DataFrame:
    every, parts = ledger(config, of), []
    for name in names:
        trained = role == "test" and name in SOURCES and role not in SOURCES[name].roles
        roles = list(SOURCES[name].roles) if trained else [role]
        rows = pd.concat([_rows(every, name, r) for r in roles], ignore_index=True)
        if rows.empty:
            raise DCRError(
                f"benchmark {name!r} has no prompt with the role {role}: each one's request occurs in training, in "
                "anchors or in validation (dcr.data.sets.dropped lists them). Name another source."
            )
        stem = Path(name).name.split(".")[0] if Path(name).is_file() else name
        for label, some in rows.groupby("label", sort=False):
            some = first_requests(some, config.data.limit)
            several = rows["label"].nunique() > 1
            some = some.assign(benchmark=f"{stem}-{SIDES[label]}" if several else stem)
            parts.append(some.assign(version="published"))
            if config.evaluation.forms:
                few = first_requests(some, config.evaluation.forms_limit)
                parts.append(swap_table(few).assign(version="swapped"))
    asked = pd.concat(parts, ignore_index=True)
    training = every[every["role"].isin(TRAINING)]
    asked["met"] = asked["source"].isin(training["source"])
    if (twice := asked["id"].duplicated()).any():
        raise DCRError(
            f"prompt {asked.loc[twice, 'id'].iloc[0]!r} stands in two benchmarks. Name each set once."
        )
    return asked


def first_requests(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    """All rows of the first n requests (0: all) in the hash order of the ledger, which knows no seed."""
    order = rows.groupby("request")["rank"].min().sort_values()
    return rows[rows["request"].isin(order.index[: n or len(order)])].reset_index(drop=True)


def anchors(config: Config, role: str, n: int = 0, of: Sequence[Config] = ()) -> pd.DataFrame:
    """`n` anchors (default `steering.anchors`; or all there are) of a role: harmful, pseudo or harmless.

    From AdvBench and OR-Bench where the configuration trains on published data, else from the bundled pairs.
    """
    setting = "bundled" if config.data.toxic == "bundled" else ANCHORS.get(role, "")
    setting = config.data.general if role == "harmless" else setting
    rows = _rows(ledger(config, of), setting, "anchor", LABEL_OF[role])
    return _drawn(rows, n or config.steering.anchors, config, 0)


def dropped(config: Config, of: Sequence[Config] = ()) -> pd.DataFrame:
    """Rows table, id, why: every prompt that is left out since its request has another role elsewhere."""
    every = ledger(config, of)
    return every.loc[every["role"] == "", ["table", "id", "why"]].reset_index(drop=True)


def natural_cells(prompts: pd.DataFrame) -> pd.DataFrame:
    """Rows toxic, form, requests: the natural 2 × 2 of test prompts, forms as written."""
    rows = prompts[(prompts["version"] == "published") & (prompts["role"] == "test")]
    rows = rows[(rows["label"] != "general") & (rows["form"] != "statement")]
    cells = rows.assign(toxic=rows["label"] == "toxic").groupby(["toxic", "form"])["request"]
    return cells.nunique().rename("requests").reset_index()


def table_hash(rows: pd.DataFrame) -> str:
    """16 hex digits over what an artifact depends on when it depends on prompts: ids, texts, labels, answers ..."""
    wanted = ("id", "text", "label", "response", "role", "part", "form", "pair_id", "request")
    text = rows[[c for c in wanted if c in rows]].to_json(orient="values", force_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
