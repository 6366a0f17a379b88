"""What each stage and each question sees: drawn from the ledger, the same way for every method.

`of` is everywhere as for `ledger`: an experiment gives its own configuration.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from dcr.config import Config
from dcr.data.forms import swap_table
from dcr.data.ledger import (
    ANCHORS,
    BUNDLED_SETS,
    hash_of,
    ledger,
    names_in,
    stands_apart,
    trains_on_published,
)
from dcr.data.read import file_of
from dcr.data.sources import SOURCES, audit
from dcr.errors import DCRError

log = logging.getLogger("dcr")
PLAIN_REFUSAL = "I'm sorry, but I can't help with that."  # for toxic prompts without an answer
TRAINING = ("refine", "align", "anchor")
GENERAL = 128  # general prompts of stage 1 (harmless class, retention)
CLASS = {"harmful": "toxic", "pseudo": "seemingly_toxic", "harmless": "general"}  # of anchors
SIDES = {"toxic": "toxic", "seemingly_toxic": "safe", "general": "general"}
PUBLISHED_FORMS = {"toxic": "imperative", "seemingly_toxic": "question"}  # of the paper's sets


@dataclass(frozen=True)
class TrainingSets:
    """Prompt tables of one recipe; general: stage 1's third class or what retention holds.

    `mix` (stage 2) has a column `part`: general, safe (toxic prompt, refusal), augment (harmless
    one, answered) or pairs (both sides of minimal pairs).
    """

    toxic: pd.DataFrame
    seemingly_toxic: pd.DataFrame
    general: pd.DataFrame
    mix: pd.DataFrame


def training_sets(config: Config, of: Sequence[Config] = ()) -> TrainingSets:
    """What a recipe trains on.

    Prompts are ranked by sha256(seed:request) and the first n taken; only then does an audit
    filter them, so that an audited set is a part of the other. Stage 1 takes at most what is at
    hand; the mix raises DCRError for too large n.
    """
    data, every = config.data, ledger(config, of)
    n, m = data.n_toxic, data.n_seemingly_toxic
    if data.toxic == data.seemingly_toxic == "bundled":  # both members of a pair
        n = m = min(n or m, m or n)
    toxic = _formed(config, _rows(every, data.toxic, "refine", "toxic"))
    seemingly = _formed(config, _rows(every, data.seemingly_toxic, "refine", "seemingly_toxic"))
    general = _rows(every, "bundled", "refine", "general")
    return TrainingSets(
        toxic=_drawn(toxic, n, config, data.form_mix),
        seemingly_toxic=_drawn(seemingly, m, config, data.form_mix),
        general=_drawn(general, GENERAL, config),
        mix=_mix(config, every),
    )


def _mix(config: Config, every: pd.DataFrame) -> pd.DataFrame:
    data, align = config.data, config.align
    extra = "bundled" if align.augment_source == "pairs" else align.augment_source
    parts = []
    for part, setting, label, n in (
        ("general", data.general, "general", align.n_general),
        ("safe", data.align_toxic, "toxic", align.n_safe),
        ("augment", extra, "seemingly_toxic", align.n_augment),
        ("pairs", "bundled", "toxic", align.n_pairs),
        ("pairs", "bundled", "seemingly_toxic", align.n_pairs),
    ):
        rows = _rows(every, setting, "align", label)
        rows = rows if part == "pairs" else _formed(config, rows)  # pairs differ in harm alone
        if config.data.refusals == "plain" and label == "toxic":
            rows = rows.assign(response=PLAIN_REFUSAL)
        bare = rows["response"] == ""
        if n and part == "safe" and bare.any():
            there = f"{bare.sum()} of {len(rows)} toxic prompts have no answer"
            log.info("alignment mix: %s; they are refused with %r", there, PLAIN_REFUSAL)
            rows = rows.assign(response=rows["response"].mask(bare, PLAIN_REFUSAL))
        rows = rows[rows["response"] != ""]
        if n > len(rows) and part in ("augment", "pairs"):
            log.warning("align.n_%s=%d, but %d are at hand: all are taken", part, n, len(rows))
        elif n > len(rows):
            raise DCRError(
                f"align.n_{part}={n}, but only {len(rows)} prompts of {setting} are for alignment. "
                f"Lower align.n_{part} or name a larger source."
            )
        if n:
            parts.append(_drawn(rows, n, config, align.form_mix).assign(part=part))
    if not parts:
        raise DCRError(
            "the alignment mix is empty: set align.n_general, align.n_safe, align.n_augment or "
            "align.n_pairs above 0."
        )
    mix = pd.concat(parts)
    return mix[~mix["id"].str.rstrip("~").duplicated()].reset_index(drop=True)


def _rows(every: pd.DataFrame, setting: str, role: str, label: str = "") -> pd.DataFrame:
    """The ledger's rows of a setting ("safety-only+bundled") that play a role, of one class."""
    parts = []
    for name in names_in(setting):
        if name in BUNDLED_SETS:
            split, its = BUNDLED_SETS[name]
            mine = (every["table"] == "bundled") & (every["split"] == split)
            parts.append(every[mine & (every["label"] == its)])
        else:
            parts.append(every[every["table"] == name])
    rows = pd.concat(parts, ignore_index=True)
    return rows[(rows["role"] == role) & rows["label"].isin([label] if label else SIDES)]


def _formed(config: Config, rows: pd.DataFrame, as_published: bool = True) -> pd.DataFrame:
    """Rows in the form in which their class is published, or (False) each in the other one.

    Where `data.bundled_forms` is "published", bundled prompts take their class's form.
    """
    off = pd.Series(False, rows.index)
    if config.data.bundled_forms == "published":
        wanted = rows["label"].map(PUBLISHED_FORMS).where(rows["table"] == "bundled")
        off = wanted.notna() & (rows["form"] != wanted)
    swapped = off if as_published else ~off
    return pd.concat([rows[~swapped], swap_table(rows[swapped])]).reindex(rows.index)


def _drawn(rows: pd.DataFrame, n: int, config: Config, share: float = 0.0) -> pd.DataFrame:
    """The first n rows (0: all) in the seed's hash order, `share` of them swapped, then audited."""
    order = [hash_of(f"{config.seed}:{request}") for request in rows["request"]]
    rows = rows.assign(_order=order).sort_values(["_order", "id"]).drop(columns="_order")
    rows = mixed_forms(rows.head(n or len(rows)).reset_index(drop=True), share)
    if config.data.audited:
        marks = rows["id"].str.rstrip("~").map(audit()).fillna("harmful")
        rows = rows[marks == "harmful"].reset_index(drop=True)
    return rows


def mixed_forms(rows: pd.DataFrame, share: float) -> pd.DataFrame:
    """The rows with `share` of them in the other form, evenly along the table; ids get "~"."""
    if not share:
        return rows
    swapped = [int((i + 1) * share) > int(i * share) for i in range(len(rows))]
    chosen = pd.Series(swapped, rows.index)
    return pd.concat([rows[~chosen], swap_table(rows[chosen])]).sort_index()


# ---- what is asked ----------------------------------------------------------------------------


def test_prompts(config: Config, of: Sequence[Config] = ()) -> pd.DataFrame:
    """The prompts of `data.benchmarks`; columns benchmark, version {published, swapped}, met too.

    The same for every method and seed. role is "test", but a set that is trained on (XSTest)
    keeps its own: it stands apart and enters no average. met: its source serves training or
    anchors too. Raises DCRError for a set with no prompt left.
    """
    return _asked(config, config.data.benchmarks, "test", of)


def validation_prompts(config: Config, of: Sequence[Config] = ()) -> pd.DataFrame:
    """The prompts of `data.validation`, on which thresholds and recipes are chosen."""
    return _asked(config, config.data.validation, "validation", of)


def _asked(config: Config, names: Sequence[str], role: str, of: Sequence[Config]) -> pd.DataFrame:
    if not names:
        setting = "benchmarks" if role == "test" else "validation"
        raise DCRError(f"data.{setting} names no set. Name at least one.")
    every, parts, of_set = ledger(config, of), [], dict[str, str]()
    for name in names:
        apart = role == "test" and stands_apart(name)
        rows = _rows(every, name, "refine" if apart else role)
        if rows.empty:
            raise DCRError(
                f"{name}: no prompt is left for {role}; each one's request serves training, "
                "anchors or validation (see dcr.data.sets.dropped). Name another source."
            )
        path = file_of(name)
        stem = path.name.split(".")[0] if path else name
        limits = [n for n in (config.data.limit, name in SOURCES and SOURCES[name].first) if n]
        for label, some in rows.groupby("label", sort=False):
            its = stem + (f"-{SIDES[str(label)]}" if rows["label"].nunique() > 1 else "")
            if (other := of_set.setdefault(its, name)) != name:
                raise DCRError(f"{name} and {other} would both be the set {its!r}. Rename one.")
            some = first_requests(some.assign(benchmark=its), min(limits, default=0))
            parts.append(_formed(config, some).assign(version="published"))
            if config.evaluation.forms:
                some = first_requests(some, config.evaluation.forms_limit)
                parts.append(_formed(config, some, False).assign(version="swapped"))
    asked = pd.concat(parts, ignore_index=True)
    asked["met"] = asked["source"].isin(every.loc[every["role"].isin(TRAINING), "source"])
    if (twice := asked["id"].duplicated()).any():
        raise DCRError(
            f"prompt {asked.loc[twice, 'id'].iloc[0]!r} stands in two sets. Name each set once."
        )
    return asked


def first_requests(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    """All rows of the first n requests (0: all) in the ledger's hash order, which has no seed."""
    first = sorted(set(rows["request"]))[: n or len(rows)]  # the name of a request is its hash
    return rows[rows["request"].isin(first)].reset_index(drop=True)


def anchors(config: Config, role: str, n: int = 0, of: Sequence[Config] = ()) -> pd.DataFrame:
    """`n` (default `steering.anchors`; or all there are) anchors: harmful, pseudo or harmless.

    From AdvBench and OR-Bench where the configuration trains on published data, else bundled.
    "pairs": all bundled pairs for training in both forms, for what is fitted to read harm.
    """
    every = ledger(config, of)
    if role == "pairs":
        pairs = every.query("table == 'bundled' and pair_id != '' and role in @TRAINING")
        return pd.concat([pairs, swap_table(pairs)], ignore_index=True)
    setting = ANCHORS.get(role, "") if trains_on_published(config) else "bundled"
    setting = config.data.general if role == "harmless" else setting
    rows = _rows(every, setting, "anchor", CLASS[role])
    if rows.empty and role == "harmless":  # a user's own table serves alignment alone
        log.info("anchors: %s has none; the bundled general prompts serve", setting)
        rows = _rows(every, "bundled", "anchor", CLASS[role])
    return _drawn(rows, n or config.steering.anchors, config)


def dropped(config: Config, of: Sequence[Config] = ()) -> pd.DataFrame:
    """table, id, why of every prompt left out since its request has another role elsewhere."""
    every = ledger(config, of)
    return every.loc[every["role"] == "", ["table", "id", "why"]].reset_index(drop=True)


def table_hash(rows: pd.DataFrame, *more: str) -> str:
    """16 hex digits over what an artifact depends on that depends on prompts; `more`: columns."""
    wanted = "id text label response role part form pair_id request".split() + list(more)
    known = rows[[c for c in wanted if c in rows]]
    return hash_of(known.to_json(orient="values", force_ascii=False))
