"""How far toxic and harmless prompts lie apart in hidden states, beside what their surface tells.

Everywhere one probe with one C. Readings are scores, one a prompt (higher: more toxic), so that
whatever reads scores (AUROC by form and by source, intervals over requests, thresholds) reads
probes too. Folds hold a request whole: its two forms and both members of a minimal pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, log_loss, normalized_mutual_info_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from dcr.errors import DCRError
from dcr.lm.states import HiddenStates

C = 0.01  # strong: a probe has more dimensions than prompts
FOLDS = 5


@dataclass(frozen=True)
class Probe:
    """A linear reader of hidden states: `states @ weight + bias`, log odds at equal class sizes."""

    weight: np.ndarray  # [hidden], the scaler folded in
    bias: float

    def decision_function(self, states: np.ndarray) -> np.ndarray:
        """[n, hidden] → [n] log odds; above 0 toxic is the likelier class."""
        return np.asarray(states) @ self.weight + self.bias


def fit_probe(states: np.ndarray, toxic: np.ndarray) -> Probe:
    """The one probe: logistic regression on standardised states [n, hidden]; toxic [n] is 0 or 1.

    Classes weigh the same: else the intercept holds the training fold's class ratio, which runs
    against the held-out fold's.
    """
    scaler = StandardScaler().fit(states)
    model = LogisticRegression(C=C, max_iter=1000, class_weight="balanced")
    model.fit(scaler.transform(states), toxic)
    weight = model.coef_[0] / scaler.scale_
    return Probe(weight, float(model.intercept_[0] - scaler.mean_ @ weight))


def is_toxic(prompts: pd.DataFrame) -> np.ndarray:
    """[n] 1 for toxic, 0 for the rest. Raises DCRError unless both classes have two prompts."""
    y = (prompts["label"] == "toxic").to_numpy().astype(int)
    for value, name in ((1, "toxic"), (0, "seemingly toxic")):
        if (y == value).sum() < 2:
            raise DCRError(
                f"separability needs at least 2 {name} prompts, got {(y == value).sum()}."
            )
    return y


def groups_of(prompts: pd.DataFrame) -> np.ndarray:
    """[n] fold groups: the request; without that column the minimal pair, else twins."""
    if "request" in prompts:
        return prompts["request"].to_numpy()
    pair = prompts["pair_id"].astype(str).str.replace(r"-(q|i)$", "", regex=True).to_numpy()
    own = (
        prompts["id"].astype(str).str.rstrip("~").to_numpy()
        if "id" in prompts
        else np.arange(len(prompts)).astype(str)
    )
    return np.where(pair != "", pair, own)


def auroc(
    toxic: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray | float:
    """Share of (toxic, harmless) pairs in order, ties 1/2; NaN where a class has no weight.

    weights: [n], or [draws, n] (how often each prompt was drawn) for an AUROC a draw, [draws].
    """
    toxic, scores = np.asarray(toxic, dtype=bool), np.asarray(scores, dtype=float)
    weights = np.ones(len(scores)) if weights is None else np.asarray(weights, dtype=float)
    order = np.argsort(scores, kind="stable")
    first = np.flatnonzero(
        np.r_[True, np.diff(scores[order]) > 0]
    )  # where each distinct score begins
    ranked, positive = weights[..., order], toxic[order]
    above = np.add.reduceat(ranked * positive, first, axis=-1)  # [draws, distinct scores]
    below = np.add.reduceat(ranked * ~positive, first, axis=-1)
    pairs = above.sum(-1) * below.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (above * (below.cumsum(-1) - below / 2)).sum(-1) / pairs


def cross_scores(
    features: Any,
    y: np.ndarray,
    groups: np.ndarray,
    unseen: tuple[Any, np.ndarray] | None = None,
    *,
    fit: Callable[[Any, np.ndarray], Any] = fit_probe,
    seed: int = 0,
) -> np.ndarray:
    """[n] scores of `unseen` (features, groups; default: the rows themselves), each from the fold
    that held its group out.

    A row whose group was never trained on gets the mean over folds (stratified).
    Raises DCRError for fewer than two groups a class.
    """
    others, other_groups = unseen or (features, groups)
    folds = min(FOLDS, len(np.unique(groups[y == 1])), len(np.unique(groups[y == 0])))
    if folds < 2:
        raise DCRError(
            "a cross-validated probe needs at least two requests of each class; give more prompts."
        )
    total, count = np.zeros(len(other_groups)), np.zeros(len(other_groups))
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(features, y, groups)
    for train, _ in split:
        rows = np.flatnonzero(~np.isin(other_groups, groups[train]))
        if len(rows):
            total[rows] += fit(features[train], y[train]).decision_function(others[rows])
            count[rows] += 1
    return total / count


def layer_scores(
    states: HiddenStates, prompts: pd.DataFrame, layers: Sequence[int] = (), *, seed: int = 0
) -> pd.DataFrame:
    """[n prompts, layers] cross-validated probe scores at each layer (default: all)."""
    return transfer_scores(states, prompts, states, prompts, layers, seed=seed)


def transfer_scores(
    states: HiddenStates,
    prompts: pd.DataFrame,
    others: HiddenStates,
    other_prompts: pd.DataFrame,
    layers: Sequence[int] = (),
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """[n others, layers]: the probes of one set read on another (an unseen source, swapped twins).

    A request that was trained on, in either form or as a member of a pair, is scored by the fold
    that held it out. An AUROC below 0.5 says that the probe follows something else than harm: the
    sentence's form, or the source.
    """
    y, groups, other_groups = is_toxic(prompts), groups_of(prompts), groups_of(other_prompts)
    return pd.DataFrame(
        {
            layer: cross_scores(
                states.layer(layer), y, groups, (others.layer(layer), other_groups), seed=seed
            )
            for layer in layers or range(states.n_layers + 1)
        },
        index=other_prompts.index,
    )


def surface_scores(prompts: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """[n, 4] what the surface alone tells: question-mark, length, source, tf-idf.

    The rule "toxic unless it ends in ?"; cross-validated: length in words, source one-hot (perfect
    when each class comes from its own), tf-idf of words and word pairs.
    """
    y, groups, texts = is_toxic(prompts), groups_of(prompts), prompts["text"].astype(str)
    words = texts.str.split().str.len().to_numpy(dtype=float)[:, None]
    source = OneHotEncoder(sparse_output=False).fit_transform(prompts[["source"]])
    tfidf = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)).fit_transform(texts)
    many = LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced")
    columns = {
        "question-mark": np.where(texts.str.strip().str.endswith("?"), -1.0, 1.0),
        "length": cross_scores(words, y, groups, seed=seed),
        "source": cross_scores(source, y, groups, seed=seed),
        "tf-idf": cross_scores(tfidf, y, groups, fit=many.fit, seed=seed),
    }
    return pd.DataFrame(columns, index=prompts.index)


def points(prompts: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Rows name (a column of `scores`), auroc, accuracy (threshold 0), n; without intervals."""
    y = is_toxic(prompts)
    return pd.DataFrame(
        {
            "name": name,
            "auroc": float(auroc(y, column)),
            "accuracy": float(((column > 0) == y).mean()),
            "n": len(y),
        }
        for name, column in scores.items()
    )


def best_layer(
    states: HiddenStates, prompts: pd.DataFrame, *, seed: int = 0
) -> tuple[int, pd.DataFrame]:
    """ℓ where a cross-validated probe reads the classes best, and a table layer, auroc, log_loss.

    By AUROC; where several are alike (often 1.0), by log loss. The last layer, behind the final
    norm, is no candidate.
    """
    y, layers = is_toxic(prompts), range(1, max(2, states.n_layers))
    scores = layer_scores(states, prompts, layers, seed=seed)
    balance = np.where(y, 0.5 / y.sum(), 0.5 / (1 - y).sum())
    rows = [
        {
            "layer": layer,
            "auroc": float(auroc(y, scores[layer])),
            "log_loss": log_loss(y, 1 / (1 + np.exp(-scores[layer])), sample_weight=balance),
        }
        for layer in layers
    ]
    best = min(rows, key=lambda r: (-round(r["auroc"], 3), r["log_loss"]))
    return int(best["layer"]), pd.DataFrame(rows)


def cosine_structure(
    states: HiddenStates, prompts: pd.DataFrame, layers: Sequence[int] = ()
) -> pd.DataFrame:
    """Rows layer, pair (toxic-toxic, seemingly-seemingly, cross), cosine: means over pairs."""
    y, rows = is_toxic(prompts).astype(bool), []
    off = ~np.eye(len(y), dtype=bool)
    for layer in layers or range(states.n_layers + 1):
        unit = states.layer(layer) / np.linalg.norm(states.layer(layer), axis=1, keepdims=True)
        similarity = unit @ unit.T
        for name, mask in (
            ("toxic-toxic", y[:, None] & y & off),
            ("seemingly-seemingly", ~y[:, None] & ~y & off),
            ("cross", y[:, None] & ~y),
        ):
            rows.append({"layer": layer, "pair": name, "cosine": float(similarity[mask].mean())})
    return pd.DataFrame(rows)


def cluster_by_layer(
    states: HiddenStates, prompts: pd.DataFrame, layers: Sequence[int] = (), *, seed: int = 0
) -> pd.DataFrame:
    """Rows layer, ari, nmi: k-means, two clusters, standardised states, against the classes."""
    y, rows = is_toxic(prompts), []
    for layer in layers or range(states.n_layers + 1):
        scaled = StandardScaler().fit_transform(states.layer(layer))
        found = KMeans(2, n_init=5, random_state=seed).fit_predict(scaled)
        ari, nmi = adjusted_rand_score(y, found), normalized_mutual_info_score(y, found)
        rows.append({"layer": layer, "ari": float(ari), "nmi": float(nmi)})
    return pd.DataFrame(rows)


def map_2d(states: HiddenStates, layer: int) -> np.ndarray:
    """[n, 2] first two principal components of a layer's standardised states (fixed signs)."""
    scaled = StandardScaler().fit_transform(states.layer(layer))
    found = PCA(2, svd_solver="full").fit_transform(scaled)
    return found * np.sign(found[np.abs(found).argmax(axis=0), [0, 1]])


# Until the tables have switched to scores: readings with intervals of their own.


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


def probe_by_layer(states, prompts, layers=None, seed: int = 0) -> pd.DataFrame:
    """Rows layer, auroc, low, high, accuracy, n (goes: `layer_scores`)."""
    return _read(prompts, layer_scores(states, prompts, layers or (), seed=seed), "layer", seed)


def transfer_auroc(train, train_prompts, test, test_prompts, layers, seed: int = 0) -> pd.DataFrame:
    """Rows layer, auroc, low, high, accuracy, n (goes: `transfer_scores`)."""
    scores = transfer_scores(train, train_prompts, test, test_prompts, layers, seed=seed)
    return _read(test_prompts, scores, "layer", seed)


def probe_by_form(
    states, prompts, swapped, swapped_prompts, layer: int, seed: int = 0
) -> pd.DataFrame:
    """AUROC of each cell of form (goes: `transfer_scores`)."""
    from dcr.analysis.refusal import auroc_by_form

    scores = [
        transfer_scores(states, prompts, s, p, [layer], seed=seed)[layer]
        for s, p in ((states, prompts), (swapped, swapped_prompts))
    ]
    both = pd.concat([prompts, swapped_prompts], ignore_index=True)
    return auroc_by_form(both, np.concatenate(scores)).assign(layer=layer)


def surface_baselines(prompts: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Rows baseline, auroc, low, high, accuracy, n (goes: `surface_scores`)."""
    return _read(prompts, surface_scores(prompts, seed=seed), "baseline", seed)


def _read(prompts: pd.DataFrame, scores: pd.DataFrame, name: str, seed: int) -> pd.DataFrame:
    y, groups = is_toxic(prompts), groups_of(prompts)
    return pd.DataFrame(
        {name: column, **auroc_interval(y, values.to_numpy(), groups, seed)}
        for column, values in scores.items()
    )
