"""Probes, clusters and surface scores on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dcr.analysis.probes import (
    best_layer,
    cluster_by_layer,
    cosine_structure,
    cross_scores,
    fit_probe,
    is_toxic,
    layer_scores,
    map_2d,
    surface_scores,
)
from dcr.errors import DCRError


@pytest.fixture
def prompts() -> pd.DataFrame:
    """30 requests, each in both classes and both forms."""
    rows = []
    for i in range(60):
        for label in ("toxic", "seemingly_toxic"):
            mark = "?" if i % 2 else "."
            rows.append(
                {
                    "text": f"word{i} word{i + 1} {'harm' if label == 'toxic' else 'calm'}{mark}",
                    "label": label,
                    "request": f"p{i // 2}",
                    "source": "one",
                    "form": mark,
                }
            )
    return pd.DataFrame(rows)


def planted(prompts, gap: float, noise: float = 1.0, seed: int = 0) -> np.ndarray:
    """Layer 0 pure noise, layer 1 with a class direction of size `gap` planted."""
    rng = np.random.default_rng(seed)
    values = rng.normal(scale=noise, size=(2, len(prompts), 16)).astype(np.float32)
    values[1, :, 3] += gap * (prompts["label"] == "toxic").to_numpy()
    return values


def auroc(prompts, scores) -> float:
    return roc_auc_score(is_toxic(prompts), scores)


def test_the_probe_is_the_librarys_with_the_scaler_folded_in():
    rng = np.random.default_rng(0)
    states = rng.normal(3.0, rng.uniform(0.1, 5.0, 8), size=(80, 8))
    toxic = (states[:, 0] + rng.normal(size=80) > 3.0).astype(int)
    model = LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000)
    theirs = make_pipeline(StandardScaler(), model).fit(states, toxic).decision_function(states)
    ours = fit_probe(states, toxic).decision_function(states)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)


def test_the_probe_recovers_a_planted_direction():
    rng = np.random.default_rng(0)
    direction = rng.normal(size=64) / 8
    toxic = rng.integers(2, size=400)
    probe = fit_probe(rng.normal(size=(400, 64)) + 6 * toxic[:, None] * direction, toxic)
    found = probe.weight / np.linalg.norm(probe.weight)
    assert found @ direction / np.linalg.norm(direction) > 0.95


def test_scores_by_layer_find_what_is_planted_and_nothing_in_noise(prompts):
    scores = layer_scores(planted(prompts, 6.0), prompts)
    assert scores.shape == (120, 2) and scores.index.equals(prompts.index)
    assert auroc(prompts, scores[1]) > 0.97 and 0.3 < auroc(prompts, scores[0]) < 0.7


def test_a_request_stays_in_one_fold(prompts):
    """States that say only which request a prompt is of: a probe that had met it would be
    perfect."""
    which = pd.factorize(prompts["request"])[0]
    states = np.random.default_rng(0).normal(size=(30, 40))[which][None].astype(np.float32)
    rows = prompts.assign(label=np.where(which % 2, "toxic", "seemingly_toxic"))
    assert auroc(rows, layer_scores(states, rows)[0]) < 0.75
    assert auroc(rows, layer_scores(states, rows.assign(request=range(120)))[0]) > 0.9
    with pytest.raises(DCRError, match="no column `request`"):
        layer_scores(states, rows.drop(columns="request"))


def test_a_request_trained_on_is_scored_by_the_fold_that_held_it_out(prompts):
    states = np.random.default_rng(0).normal(size=(1, len(prompts), 100)).astype(np.float32)
    rows = prompts.assign(request=range(120))
    found = layer_scores(states, rows, [0], (states, rows.assign(text="swapped")))
    assert 0.3 < auroc(rows, found[0]) < 0.7


def test_transfer_reads_unseen_sources_and_follows_form_where_form_was_learnt(prompts):
    other = prompts.assign(request=[f"o{i}" for i in range(120)], source="two")
    unseen = planted(other, 6.0, seed=1), other
    found = layer_scores(planted(prompts, 6.0), prompts, [1], unseen)
    assert auroc(other, found[1]) > 0.97
    train = prompts[(prompts.label == "toxic") == (prompts.form == ".")]
    test = prompts[(prompts.label == "toxic") == (prompts.form == "?")]

    def states(rows):
        rng = np.random.default_rng(1)
        values = rng.normal(scale=0.1, size=(1, len(rows), 4)).astype(np.float32)
        values[0, :, 0] += (rows["form"] == ".").to_numpy()
        return values

    assert auroc(test, layer_scores(states(train), train, [0], (states(test), test))[0]) < 0.05


def test_best_layer_finds_the_planted_one_and_breaks_ties_by_loss(prompts):
    toxic = (prompts["label"] == "toxic").to_numpy()
    values = np.random.default_rng(0).normal(size=(6, 120, 16)).astype(np.float32)
    for layer, gap in ((0, 99.0), (2, 20.0), (3, 40.0), (5, 99.0)):  # 0 and 5 are no candidates
        values[layer, :, :4] += gap * toxic[:, None]
    layer, table = best_layer(values, prompts)
    assert table.set_index("layer")["auroc"].loc[[2, 3]].tolist() == [1.0, 1.0]
    assert layer == 3 and table["layer"].tolist() == [1, 2, 3, 4]


def test_surface_scores_see_only_the_surface(prompts):
    scores = surface_scores(prompts)
    assert list(scores) == ["question-mark", "length", "source", "tf-idf"]
    assert auroc(prompts, scores["question-mark"]) == 0.5
    assert auroc(prompts, scores["source"]) == pytest.approx(0.5, abs=0.15)
    assert auroc(prompts, scores["tf-idf"]) > 0.9  # harm and calm are words
    split = prompts.assign(source=prompts["label"])
    assert auroc(split, surface_scores(split)["source"]) == 1.0


def test_a_feature_that_says_nothing_is_at_chance_when_groups_are_lopsided():
    """Each request holds one class mostly: an intercept would tell the fold's ratio, backwards."""
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        {
            "text": f"w{i} {rng.integers(9)}",
            "label": "toxic" if rng.uniform() < (0.9 if g % 2 else 0.2) else "seemingly_toxic",
            "request": f"g{g}",
            "source": "one",
        }
        for g in range(8)
        for i in range(12)
    )
    assert auroc(rows, surface_scores(rows)["source"]) == pytest.approx(0.5)


def test_clusters_and_cosines(prompts):
    states = planted(prompts, 12.0, noise=0.3)
    states[1] += 5.0 * (prompts["label"] == "toxic").to_numpy()[:, None]
    clusters = cluster_by_layer(states, prompts).set_index("layer")
    assert clusters.loc[1, "ari"] > 0.9 and abs(clusters.loc[0, "ari"]) < 0.2
    cosine = cosine_structure(states, prompts, [1]).set_index("pair")["cosine"]
    assert cosine["toxic-toxic"] > 0.9 > cosine["cross"]


def test_map_is_deterministic(prompts):
    states = planted(prompts, 6.0)
    assert np.array_equal(map_2d(states, 1), map_2d(states, 1))
    assert map_2d(states, 1).shape == (120, 2)


def test_one_class_is_refused(prompts):
    with pytest.raises(DCRError, match="at least 2 toxic prompts, got 0"):
        surface_scores(prompts[prompts.label != "toxic"])
    with pytest.raises(DCRError, match="two requests of each class"):
        surface_scores(prompts.assign(request="one"))
    y, groups = np.array([1, 1, 0, 0]), np.array(list("abac"))  # without a, a fold has one class
    with pytest.raises(DCRError, match="two requests of each class"):
        cross_scores(np.eye(4), y, groups)
