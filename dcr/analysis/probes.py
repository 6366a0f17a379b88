"""How far toxic and seemingly toxic prompts lie apart in hidden states, beside what surface form alone can tell.

Probes are cross-validated in groups, so that both members of a minimal pair fall in one fold.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from dcr.errors import DCRError
from dcr.lm.states import HiddenStates

log = logging.getLogger("dcr")


def is_toxic(prompts: pd.DataFrame) -> np.ndarray:
    """[n] 1 for toxic, 0 for seemingly toxic (or general). Raises DCRError unless both classes have two prompts."""
    y = (prompts["label"] == "toxic").to_numpy().astype(int)
    for value, name in ((1, "toxic"), (0, "seemingly toxic")):
        if (y == value).sum() < 2:
            raise DCRError(
                f"separability needs at least 2 {name} prompts, got {(y == value).sum()}."
            )
    return y


def groups_of(prompts: pd.DataFrame) -> np.ndarray:
    """Fold groups: the minimal pair (its two forms together) where there is one, else the prompt and its swapped form."""
    pair = prompts["pair_id"].astype(str).str.replace(r"-(q|i)$", "", regex=True).to_numpy()
    own = (
        prompts["id"].astype(str).str.rstrip("~").to_numpy()
        if "id" in prompts
        else np.arange(len(prompts)).astype(str)
    )
    return np.where(pair != "", pair, own)


def cosine_structure(
    states: HiddenStates, prompts: pd.DataFrame, layers: Sequence[int] | None = None
) -> pd.DataFrame:
    """Rows layer, pair (toxic-toxic, seemingly-seemingly, cross), cosine: the mean over pairs of different prompts."""
    y, rows = is_toxic(prompts).astype(bool), []
    for layer in layers if layers is not None else range(states.n_layers + 1):
        unit = states.layer(layer) / np.linalg.norm(states.layer(layer), axis=1, keepdims=True)
        similarity = unit @ unit.T
        off = ~np.eye(len(y), dtype=bool)
        for name, mask in (
            ("toxic-toxic", y[:, None] & y & off),
            ("seemingly-seemingly", ~y[:, None] & ~y & off),
            ("cross", y[:, None] & ~y),
        ):
            rows.append({"layer": layer, "pair": name, "cosine": float(similarity[mask].mean())})
    return pd.DataFrame(rows)


def _probe():
    # balanced: else the intercept holds the training fold's class ratio, which runs against the held-out fold's
    return make_pipeline(
        StandardScaler(), LogisticRegression(C=0.05, max_iter=1000, class_weight="balanced")
    )


def grouped_scores(
    features, y: np.ndarray, groups: np.ndarray, model, seed: int = 0, folds: int = 5
) -> np.ndarray:
    """[n] out-of-fold decision scores of a classifier, folds grouped and stratified."""
    return _held_out(features, y, groups, features, groups, model, seed, folds)


def _held_out(
    features, y, groups, others, other_groups, model, seed: int, folds: int = 5
) -> np.ndarray:
    """Scores of `others`, each from the classifier of the fold that held its group out; groups never trained on: the mean."""
    folds = min(folds, len(np.unique(groups[y == 1])), len(np.unique(groups[y == 0])))
    if folds < 2:
        raise DCRError(
            "a cross-validated probe needs at least two groups of each class; give more prompts."
        )
    total, count = np.zeros(len(other_groups)), np.zeros(len(other_groups))
    for train, _ in StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(
        features, y, groups
    ):
        rows = np.flatnonzero(~np.isin(other_groups, groups[train]))
        if len(rows):
            total[rows] += model().fit(features[train], y[train]).decision_function(others[rows])
            count[rows] += 1
    return total / count


def auroc_interval(
    y: np.ndarray, scores: np.ndarray, groups: np.ndarray, seed: int = 0, n_boot: int = 500
) -> dict:
    """AUROC and accuracy with a 95 % bootstrap interval over groups (a pair is drawn whole).

    A draw weights each group by how often it came up, and AUROC is a weighted mean over pairs of prompts (ties 1/2).
    """
    rng = np.random.default_rng([seed, 0xB0])
    names, member = np.unique(groups, return_inverse=True)
    weights = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_boot)[
        :, member
    ]
    toxic, other = weights[:, y == 1], weights[:, y == 0]
    above = np.sign(scores[y == 1][:, None] - scores[y == 0][None]) / 2 + 0.5
    size = toxic.sum(1) * other.sum(1)
    values = np.einsum("bi,bi->b", toxic @ above, other)[size > 0] / size[size > 0]
    low, high = np.quantile(values, [0.025, 0.975])
    return {
        "auroc": float(above.mean()),
        "low": float(low),
        "high": float(high),
        "accuracy": float(((scores > 0) == y).mean()),
        "n": len(y),
    }


def probe_by_layer(
    states: HiddenStates, prompts: pd.DataFrame, layers: Sequence[int] | None = None, seed: int = 0
) -> pd.DataFrame:
    """Rows layer, auroc, low, high, accuracy, n: a linear probe, cross-validated in groups."""
    y, groups = is_toxic(prompts), groups_of(prompts)
    rows = []
    for layer in layers if layers is not None else range(states.n_layers + 1):
        scores = grouped_scores(states.layer(layer), y, groups, _probe, seed)
        rows.append({"layer": layer, **auroc_interval(y, scores, groups, seed)})
    return pd.DataFrame(rows)


def transfer_auroc(
    train: HiddenStates,
    train_prompts: pd.DataFrame,
    test: HiddenStates,
    test_prompts: pd.DataFrame,
    layers: Sequence[int],
    seed: int = 0,
) -> pd.DataFrame:
    """The probe of one set read on another (e.g. form-swapped): rows layer, auroc, low, high, accuracy, n.

    A prompt that was trained on, in either form or as a member of a trained pair, is scored by a probe that held it out.
    Below 0.5 the probe follows something else than harm, such as the sentence's form.
    """
    y, target, groups = is_toxic(train_prompts), is_toxic(test_prompts), groups_of(test_prompts)
    rows = []
    for layer in layers:
        scores = _held_out(
            train.layer(layer), y, groups_of(train_prompts), test.layer(layer), groups, _probe, seed
        )
        rows.append({"layer": layer, **auroc_interval(target, scores, groups, seed)})
    return pd.DataFrame(rows)


def probe_by_form(
    states: HiddenStates,
    prompts: pd.DataFrame,
    swapped: HiddenStates,
    swapped_prompts: pd.DataFrame,
    layer: int,
    seed: int = 0,
) -> pd.DataFrame:
    """AUROC of one pairing's probe in each cell toxic_form × harmless_form, and `balanced`, their mean (with n).

    Trained on the prompts as they are; held-out prompts are scored as they are and with their form swapped, so every cell
    is filled with the same requests. A probe of harm is as good in every cell; a probe of form is not.
    """
    from dcr.analysis.refusal import auroc_by_form

    y, groups = is_toxic(prompts), groups_of(prompts)
    scores = [
        _held_out(states.layer(layer), y, groups, s.layer(layer), groups_of(p), _probe, seed)
        for s, p in ((states, prompts), (swapped, swapped_prompts))
    ]
    both = pd.concat([prompts, swapped_prompts], ignore_index=True)
    return auroc_by_form(both, np.concatenate(scores)).assign(layer=layer)


def cluster_by_layer(
    states: HiddenStates, prompts: pd.DataFrame, layers: Sequence[int] | None = None, seed: int = 0
) -> pd.DataFrame:
    """Rows layer, ari, nmi: k-means with two clusters on standardised states against the two classes."""
    y, rows = is_toxic(prompts), []
    for layer in layers if layers is not None else range(states.n_layers + 1):
        scaled = StandardScaler().fit_transform(states.layer(layer))
        found = KMeans(2, n_init=5, random_state=seed).fit_predict(scaled)
        rows.append(
            {
                "layer": layer,
                "ari": float(adjusted_rand_score(y, found)),
                "nmi": float(normalized_mutual_info_score(y, found)),
            }
        )
    return pd.DataFrame(rows)


def surface_baselines(prompts: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """What the surface alone tells: rows baseline, auroc, low, high, accuracy, n.

    question-mark (the rule "toxic unless it ends in ?"), length (words), source (one-hot; 1.0 when each class comes
    from its own source), tf-idf (words, grouped folds).
    """
    y, groups, texts = is_toxic(prompts), groups_of(prompts), prompts["text"].astype(str)
    mark = np.where(texts.str.strip().str.endswith("?"), -1.0, 1.0)
    words = texts.str.split().str.len().to_numpy(dtype=float)[:, None]
    source = OneHotEncoder(sparse_output=False).fit_transform(prompts[["source"]])
    tfidf = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)).fit_transform(texts)
    rows = [{"baseline": "question-mark", **auroc_interval(y, mark, groups, seed)}]
    for name, features, model in (
        ("length", words, _probe),
        ("source", source, _probe),
        (
            "tf-idf",
            tfidf,
            lambda: LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced"),
        ),
    ):
        rows.append(
            {
                "baseline": name,
                **auroc_interval(y, grouped_scores(features, y, groups, model, seed), groups, seed),
            }
        )
    return pd.DataFrame(rows)


def map_2d(states: HiddenStates, layer: int) -> np.ndarray:
    """[n, 2] first two principal components of one layer's standardised states (deterministic signs)."""
    from sklearn.decomposition import PCA

    points = PCA(2, svd_solver="full").fit_transform(
        StandardScaler().fit_transform(states.layer(layer))
    )
    return points * np.sign(points[np.abs(points).argmax(axis=0), [0, 1]])
