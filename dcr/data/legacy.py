"""Which prompts each stage sees: contrastive sets, the alignment mix and the benchmarks of one configuration.

Contrastive, alignment and evaluation prompts are disjoint by construction, and checked (see `leakage`).
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from dcr.config import Config
from dcr.data import loaders
from dcr.data.forms import swap_table
from dcr.data.pairs import leakage_report
from dcr.errors import DCRError

log = logging.getLogger("dcr")
# Benchmark name → bundled table, split, label.
BUNDLED_BENCHMARKS = {
    f"{name}-{side}": ("pairs", split, label)
    for name, split in (("pairs", "test"), ("style", "style"), ("validation", "validation"))
    for side, label in (("safe", "seemingly_toxic"), ("toxic", "toxic"))
} | {
    "general-test": ("general", "test", "general"),
    "general-validation": ("general", "validation", "general"),
}
# Parts of a published set: one half for choosing a recipe, the other untouched until the end; AdvBench without its many
# rewordings of one request. name → (source, part).
PARTS = {
    "coconot-validation": ("coconot", "first"),
    "coconot-test": ("coconot", "second"),
    "i-malicious-validation": ("i-malicious", "first"),
    "i-malicious-test": ("i-malicious", "second"),
    "advbench-distinct": ("advbench", "distinct"),
}
PLAIN_REFUSAL = "I'm sorry, but I can't help with that."  # for toxic prompts that come without an answer (XSTest's contrasts)
SAME_REQUEST = 0.5  # cosine of TF-IDF vectors from which prompts count as rewordings of one request


@dataclass(frozen=True)
class Sets:
    """Prompt tables of one configuration."""

    toxic: pd.DataFrame  # stage 1
    seemingly_toxic: pd.DataFrame  # stage 1
    general: pd.DataFrame  # stage 1: joined to the harmless class, or held by retention
    mix: pd.DataFrame  # stage 2: text, response, role {general, safe, augment}
    benchmarks: dict[str, pd.DataFrame] = field(default_factory=dict)


@cache
def _bundled(name: str) -> pd.DataFrame:
    return loaders.load_bundled(name)


def table(name: str, *, label: str = "", audited: bool = False) -> pd.DataFrame:
    """A prompt table by registry name, bundled benchmark name, or path of the user's CSV or JSONL."""
    if name in BUNDLED_BENCHMARKS:
        which, split, wanted = BUNDLED_BENCHMARKS[name]
        rows = _bundled(which)
        return rows[(rows["split"] == split) & (rows["label"] == wanted)].reset_index(drop=True)
    if name in PARTS:
        return _part(*PARTS[name])
    if len(parts := sources_of(name)) > 1:
        return pd.concat([table(n, label=label, audited=audited) for n in parts], ignore_index=True)
    if name.endswith((".csv", ".jsonl", ".json")):
        return loaders.read_user_table(name, label=label or None)
    return loaders.load(name, audited=audited) if name == "safety-only" else loaders.load(name)


def sources_of(name: str) -> list[str]:
    """The sources of a setting: "safety-only+xstest-unsafe" names two tables read as one; a file's path stays whole."""
    return [name] if Path(name).is_file() else [n.strip() for n in name.split("+")]


@cache
def _part(source: str, part: str) -> pd.DataFrame:
    """A half (rewordings of one request on the same side, dealt by a hash) or one prompt of each request."""
    rows = loaders.load(source)
    request = requests_of(rows["text"].tolist())
    if part == "distinct":
        return rows[~pd.Series(request).duplicated()].reset_index(drop=True)
    leader = [rows["text"].iloc[request.index(r)] for r in request]
    first = np.array([in_first_half(text) for text in leader])
    return rows[first if part == "first" else ~first].reset_index(drop=True)


def requests_of(texts: list[str]) -> list[int]:
    """Number of the request that each text words: average-linkage clusters of TF-IDF vectors, cut at SAME_REQUEST."""
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = (
        TfidfVectorizer(stop_words="english", sublinear_tf=True).fit_transform(texts).toarray()
    )
    empty = ~vectors.any(axis=1)  # only stop words: each such text is a request of its own
    vectors = np.hstack([vectors, np.diag(empty.astype(float))[:, empty]])
    clusters = AgglomerativeClustering(
        n_clusters=None, metric="cosine", linkage="average", distance_threshold=1 - SAME_REQUEST
    )
    return clusters.fit_predict(vectors).tolist()


def in_first_half(topic: str) -> bool:
    """Bundled topics are dealt to refinement (True) or alignment by a hash, so the two never share a topic."""
    return hashlib.sha256(f"dcr:{topic}".encode()).digest()[0] % 2 == 0


def _take(rows: pd.DataFrame, n: int, seed: int, what: str) -> pd.DataFrame:
    if n > len(rows):
        raise DCRError(
            f"{what}={n}, but only {len(rows)} prompts are left. Lower {what} or name a larger source."
        )
    order = np.random.default_rng([seed, 0xDA7A]).permutation(len(rows))
    return rows.iloc[order[: n or len(rows)]].reset_index(drop=True)


def _at_most(rows: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    return _take(rows, min(n, len(rows)) if n else 0, seed, "n")


def contrastive_sets(config: Config) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(toxic, seemingly toxic) of stage 1. Bundled pairs keep both members of a pair."""
    data, seed = config.data, config.seed
    if data.toxic == data.seemingly_toxic == "bundled":
        rows = _bundled("pairs")
        rows = rows[(rows["split"] == "train") & rows["topic"].map(in_first_half)]
        pairs = pd.DataFrame({"pair_id": rows["pair_id"].unique()})
        wanted = min(data.n_toxic or len(pairs), data.n_seemingly_toxic or len(pairs))
        rows = rows[rows["pair_id"].isin(_at_most(pairs, wanted, seed)["pair_id"])]
        return tuple(
            rows[rows["label"] == label].reset_index(drop=True)
            for label in ("toxic", "seemingly_toxic")
        )
    sides = []
    for label, name, n in (
        ("toxic", data.toxic, data.n_toxic),
        ("seemingly_toxic", data.seemingly_toxic, data.n_seemingly_toxic),
    ):
        rows = _training_table(name, label, True, data.audited)
        sides.append(
            mixed_forms(_at_most(rows[rows["label"] == label], n, seed), data.form_mix, seed)
        )
    return sides[0], sides[1]


def mixed_forms(rows: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """The rows with `share` of them in the other form (question ⇄ imperative), drawn by the seed; ids keep a "~"."""
    if not 0 <= share <= 1:
        raise DCRError(f"share of swapped forms is {share}; give 0 to 1.")
    if not share:
        return rows
    chosen = np.random.default_rng([seed, 0xF0]).permutation(len(rows)) < round(share * len(rows))
    return pd.concat([rows[~chosen], swap_table(rows[chosen])]).sort_index().reset_index(drop=True)


def _training_table(name: str, label: str, first: bool, audited: bool) -> pd.DataFrame:
    """Training prompts of one class from one source or several ("safety-only+bundled"); `first`: stage 1's half of the bundled."""
    return pd.concat(
        [
            _bundled_half(label, first)
            if n == "bundled"
            else table(n, label=label, audited=audited)
            for n in sources_of(name)
        ],
        ignore_index=True,
    )


def _bundled_half(label: str, first: bool) -> pd.DataFrame:
    rows = _bundled("pairs")
    return rows[
        (rows["split"] == "train")
        & (rows["label"] == label)
        & (rows["topic"].map(in_first_half) == first)
    ]


def alignment_mix(config: Config) -> pd.DataFrame:
    """Rows of stage 2 with a `role`: general, safe (toxic prompt, refusal) or augment (seemingly toxic, answered)."""
    data, align, seed = config.data, config.align, config.seed
    toxic, seemingly = contrastive_sets(config)
    safe = _training_table(data.align_toxic, "toxic", False, data.audited)
    safe = safe[~safe["text"].isin(toxic["text"])]
    if (bare := safe["response"] == "").any():
        log.info(
            "alignment mix: %d of %d toxic prompts have no answer; they are refused with %r",
            bare.sum(),
            len(safe),
            PLAIN_REFUSAL,
        )
        safe = safe.assign(response=safe["response"].mask(bare, PLAIN_REFUSAL))
    parts = [
        (
            _take(_general(config), align.n_general, seed, "align.n_general"),
            "general",
            align.n_general,
        ),
        (_take(safe, align.n_safe, seed, "align.n_safe"), "safe", align.n_safe),
    ]
    if align.n_augment:
        answered = seemingly if align.augment_source == "pairs" else table(align.augment_source)
        if align.augment_source == "pairs" and (answered["response"] == "").all():
            answered = _bundled_half("seemingly_toxic", True)
        answered = answered[answered["response"] != ""]
        if len(answered) < align.n_augment:
            log.warning(
                "align.n_augment=%d, but %d answered seemingly toxic prompts are at hand: all are taken",
                align.n_augment,
                len(answered),
            )
        parts.append((_at_most(answered, align.n_augment, seed), "augment", align.n_augment))
    kept = [
        mixed_forms(rows, align.form_mix, seed).assign(role=role) for rows, role, n in parts if n
    ]
    if not kept:
        raise DCRError(
            "the alignment mix is empty: set align.n_general, align.n_safe or align.n_augment above 0."
        )
    return pd.concat(kept, ignore_index=True)


def _general(config: Config) -> pd.DataFrame:
    if config.data.general == "bundled":
        rows = _bundled("general")
        return rows[rows["split"] == "train"].reset_index(drop=True)
    return table(config.data.general, label="general")


def general_prompts(config: Config, n: int = 128) -> pd.DataFrame:
    """Bundled general training prompts for stage 1's harmless class and retention (no alignment answers used)."""
    rows = _bundled("general")
    return _at_most(rows[rows["split"] == "train"], n, config.seed)


def benchmark(name: str, config: Config) -> pd.DataFrame:
    """One benchmark's prompts, limited by a seeded, stratified subset. Raises DCRError when nothing is left."""
    rows = table(name)
    if config.data.limit and len(rows) > config.data.limit:
        rows = loaders.stratified_subset(rows, config.data.limit, config.seed)
    if rows.empty:
        raise DCRError(
            f"benchmark {name!r} is empty after filtering; raise data.limit or check the file."
        )
    return rows.assign(benchmark=name)


def benchmarks_of(config: Config) -> dict[str, pd.DataFrame]:
    """Every benchmark by name, and with `evaluation.forms` each one form-swapped (NAME/swapped, at most `forms_limit` prompts)."""
    benchmarks = {name: benchmark(name, config) for name in config.data.benchmarks}
    if config.evaluation.forms:
        few = config.evaluation.forms_limit
        for name, rows in list(benchmarks.items()):
            rows = (
                loaders.stratified_subset(rows, few, config.seed)
                if few and len(rows) > few
                else rows
            )
            benchmarks[f"{name}/swapped"] = swap_table(rows).assign(benchmark=f"{name}/swapped")
    return benchmarks


def load_sets(config: Config) -> Sets:
    """Every prompt table of the configuration."""
    return Sets(
        *contrastive_sets(config),
        general_prompts(config),
        alignment_mix(config),
        benchmarks_of(config),
    )


def leakage(sets: Sets) -> pd.DataFrame:
    """Exact and near-duplicate overlaps between training prompts and each benchmark, and between the two stages."""
    training = {"refine": pd.concat([sets.toxic, sets.seemingly_toxic]), "align": sets.mix}
    reports = [
        leakage_report(rows, bench).assign(stage=stage, benchmark=name)
        for stage, rows in training.items()
        for name, bench in sets.benchmarks.items()
        if "/swapped" not in name
    ]
    contrast = sets.mix[sets.mix["role"] != "augment"]
    reports.append(
        leakage_report(training["refine"], contrast).assign(
            stage="refine", benchmark="(alignment mix)"
        )
    )
    return pd.concat(reports, ignore_index=True)


def table_hash(rows: pd.DataFrame) -> str:
    """16 hex digits over ids, texts, labels and answers: what an artifact depends on when it depends on prompts."""
    columns = [
        c for c in ("id", "text", "label", "response", "role", "form", "pair_id") if c in rows
    ]
    text = rows[columns].to_json(orient="values", force_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
