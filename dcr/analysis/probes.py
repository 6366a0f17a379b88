"""How far toxic and harmless prompts lie apart in hidden states, beside what their surface tells.

Everywhere one probe with one C. Readings are scores, one a prompt (higher: more toxic), so that
whatever reads scores (AUROC by form and by source, intervals over requests, thresholds) reads
probes too. Folds hold a request whole: its two forms and both members of a minimal pair.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    adjusted_rand_score,
    log_loss,
    normalized_mutual_info_score,
    roc_auc_score,
)
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from dcr.errors import DCRError

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
    for n, name in ((y.sum(), "toxic"), ((1 - y).sum(), "seemingly toxic")):
        if n < 2:
            raise DCRError(f"separability needs at least 2 {name} prompts, got {n}.")
    return y


def requests_in(prompts: pd.DataFrame) -> np.ndarray:
    """[n] the groups that folds hold whole. Raises DCRError for a table without them."""
    if "request" not in prompts:
        raise DCRError("the prompts have no column `request`; see dcr.data.read.prompts_of.")
    return prompts["request"].to_numpy()


def cross_scores(
    features: Any,
    y: np.ndarray,
    groups: np.ndarray,
    unseen: tuple[Any, np.ndarray] | None = None,
    *,
    fit: Callable[[Any, np.ndarray], Any] = fit_probe,
    seed: int = 0,
) -> np.ndarray:
    """[n] scores of `unseen`, each from the fold that held its group out.

    unseen: (features, groups), default the rows themselves; a row whose group was never trained on
    gets the mean over folds (stratified). Raises DCRError where a fold has one class to fit on.
    """
    others, other_groups = unseen or (features, groups)
    folds = min(FOLDS, len(np.unique(groups[y == 1])), len(np.unique(groups[y == 0])))
    cut = StratifiedGroupKFold(max(2, folds), shuffle=True, random_state=seed)
    split = list(cut.split(features, y, groups)) if folds > 1 else []
    if not split or any(len(np.unique(y[train])) < 2 for train, _ in split):
        raise DCRError(
            "a cross-validated probe needs at least two requests of each class; give more prompts."
        )
    total, count = np.zeros(len(other_groups)), np.zeros(len(other_groups))
    for train, _ in split:
        rows = np.flatnonzero(~np.isin(other_groups, groups[train]))
        if len(rows):
            total[rows] += fit(features[train], y[train]).decision_function(others[rows])
            count[rows] += 1
    return total / count


def layer_scores(
    states: np.ndarray,
    prompts: pd.DataFrame,
    layers: Sequence[int] = (),
    unseen: tuple[np.ndarray, pd.DataFrame] | None = None,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """[n, layers] scores of `unseen` (default: the prompts themselves) by the probe of each layer.

    unseen: states and prompts of an unseen source, of swapped twins. A request that was trained on,
    in either form or as a member of a pair, is scored by the fold that held it out. An AUROC below
    0.5 says that the probe follows something else than harm: the sentence's form, or the source.
    """
    others, read = unseen or (states, prompts)
    y, groups, other_groups = is_toxic(prompts), requests_in(prompts), requests_in(read)
    scores = {}
    for layer in layers or range(len(states)):
        held = others[layer], other_groups
        scores[layer] = cross_scores(states[layer], y, groups, held, seed=seed)
    return pd.DataFrame(scores, index=read.index)


def surface_scores(prompts: pd.DataFrame) -> pd.DataFrame:
    """[n, 4] what the surface alone tells: question-mark, length, source, tf-idf.

    The rule "toxic unless it ends in ?"; cross-validated: length in words, source one-hot (perfect
    when each class comes from its own), tf-idf of words and word pairs.
    """
    y, groups, texts = is_toxic(prompts), requests_in(prompts), prompts["text"].astype(str)
    words = np.array([[float(len(text.split()))] for text in texts])
    source = OneHotEncoder(sparse_output=False).fit_transform(prompts[["source"]])
    tfidf = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)).fit_transform(texts)
    many = LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced")
    columns = {
        "question-mark": np.where(texts.str.strip().str.endswith("?"), -1.0, 1.0),
        "length": cross_scores(words, y, groups),
        "source": cross_scores(source, y, groups),
        "tf-idf": cross_scores(tfidf, y, groups, fit=many.fit),
    }
    return pd.DataFrame(columns, index=prompts.index)


def best_layer(
    states: np.ndarray, prompts: pd.DataFrame, *, seed: int = 0
) -> tuple[int, pd.DataFrame]:
    """ℓ where a cross-validated probe reads the classes best, and a table layer, auroc, log_loss.

    By AUROC; where several are alike (often 1.0), by log loss. The last layer, behind the final
    norm, is no candidate.
    """
    y, layers = is_toxic(prompts), range(1, max(2, len(states) - 1))
    scores = layer_scores(states, prompts, layers, seed=seed)
    balance = np.where(y, 0.5 / y.sum(), 0.5 / (1 - y).sum())
    rows = [
        {
            "layer": layer,
            "auroc": float(roc_auc_score(y, scores[layer])),
            "log_loss": log_loss(y, 1 / (1 + np.exp(-scores[layer])), sample_weight=balance),
        }
        for layer in layers
    ]
    best = min(rows, key=lambda r: (-round(r["auroc"], 3), r["log_loss"]))
    return int(best["layer"]), pd.DataFrame(rows)


def cosine_structure(
    states: np.ndarray, prompts: pd.DataFrame, layers: Sequence[int] = ()
) -> pd.DataFrame:
    """Rows layer, pair (toxic-toxic, seemingly-seemingly, cross), cosine: means over pairs."""
    y, rows = is_toxic(prompts).astype(bool), []
    off = ~np.eye(len(y), dtype=bool)
    for layer in layers or range(len(states)):
        unit = states[layer] / np.linalg.norm(states[layer], axis=1, keepdims=True)
        similarity = unit @ unit.T
        for name, mask in (
            ("toxic-toxic", y[:, None] & y & off),
            ("seemingly-seemingly", ~y[:, None] & ~y & off),
            ("cross", y[:, None] & ~y),
        ):
            rows.append({"layer": layer, "pair": name, "cosine": float(similarity[mask].mean())})
    return pd.DataFrame(rows)


def cluster_by_layer(
    states: np.ndarray, prompts: pd.DataFrame, layers: Sequence[int] = ()
) -> pd.DataFrame:
    """Rows layer, ari, nmi: k-means, two clusters, standardised states, against the classes."""
    y, rows = is_toxic(prompts), []
    for layer in layers or range(len(states)):
        scaled = StandardScaler().fit_transform(states[layer])
        found = KMeans(2, n_init=5, random_state=0).fit_predict(scaled)
        ari, nmi = adjusted_rand_score(y, found), normalized_mutual_info_score(y, found)
        rows.append({"layer": layer, "ari": float(ari), "nmi": float(nmi)})
    return pd.DataFrame(rows)


def map_2d(states: np.ndarray, layer: int) -> np.ndarray:
    """[n, 2] first two principal components of a layer's standardised states (fixed signs)."""
    scaled = StandardScaler().fit_transform(states[layer])
    found = PCA(2, svd_solver="full").fit_transform(scaled)
    return found * np.sign(found[np.abs(found).argmax(axis=0), [0, 1]])
