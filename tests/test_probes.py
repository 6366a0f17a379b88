"""Probes, clusters and surface baselines on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dcr.analysis.probes import (
    auroc,
    auroc_interval,
    best_layer,
    cluster_by_layer,
    cosine_structure,
    fit_probe,
    groups_of,
    layer_scores,
    map_2d,
    points,
    probe_by_form,
    probe_by_layer,
    surface_baselines,
    surface_scores,
    transfer_auroc,
    transfer_scores,
)
from dcr.data.forms import swap_table
from dcr.errors import DCRError
from dcr.lm.states import HiddenStates


@pytest.fixture
def prompts() -> pd.DataFrame:
    rows = []
    for i in range(60):
        for label in ("toxic", "seemingly_toxic"):
            mark = "?" if i % 2 else "."
            rows.append(
                {
                    "text": f"word{i} word{i + 1} {'harm' if label == 'toxic' else 'calm'}{mark}",
                    "label": label,
                    "pair_id": f"p{i // 2}-{'q' if i % 2 else 'i'}",
                    "source": "one",
                    "form": mark,
                }
            )
    return pd.DataFrame(rows)


def planted(prompts, gap: float, noise: float = 1.0, seed: int = 0) -> HiddenStates:
    """Layer 0 pure noise, layer 1 with a class direction of size `gap` planted."""
    rng = np.random.default_rng(seed)
    values = rng.normal(scale=noise, size=(2, len(prompts), 16)).astype(np.float32)
    values[1, :, 3] += gap * (prompts["label"] == "toxic").to_numpy()
    return HiddenStates(values, "last")


def test_probe_finds_what_is_planted_and_nothing_in_noise(prompts):
    table = probe_by_layer(planted(prompts, 6.0), prompts).set_index("layer")
    assert table.loc[1, "auroc"] > 0.97 and table.loc[1, "low"] > 0.9
    assert 0.3 < table.loc[0, "auroc"] < 0.7 and table.loc[0, "low"] < 0.5 < table.loc[0, "high"]


def test_groups_hold_both_forms_of_a_pair(prompts):
    assert len(set(groups_of(prompts))) == 30


def test_grouped_folds_do_not_leak_pair_identity(prompts):
    """States that say only which pair a prompt is of: ungrouped folds could learn labels by memory, grouped cannot."""
    rng = np.random.default_rng(0)
    which = pd.factorize(groups_of(prompts))[0]
    values = rng.normal(size=(which.max() + 1, 40))[which][None].astype(np.float32)
    assert probe_by_layer(HiddenStates(values, "last"), prompts)["auroc"].iloc[0] < 0.65


def test_transfer_follows_form_when_form_was_learnt(prompts):
    train = prompts[(prompts.label == "toxic") == (prompts.form == ".")]
    test = prompts[(prompts.label == "toxic") == (prompts.form == "?")]

    def states(rows):
        values = (
            np.random.default_rng(1).normal(scale=0.1, size=(1, len(rows), 4)).astype(np.float32)
        )
        values[0, :, 0] += (rows["form"] == ".").to_numpy()
        return HiddenStates(values, "last")

    assert transfer_auroc(states(train), train, states(test), test, [0])["auroc"].iloc[0] < 0.05


def test_clusters_and_cosines(prompts):
    states = planted(prompts, 12.0, noise=0.3)
    states.values[1] += 5.0 * (prompts["label"] == "toxic").to_numpy()[:, None]
    clusters = cluster_by_layer(states, prompts).set_index("layer")
    assert clusters.loc[1, "ari"] > 0.9 and abs(clusters.loc[0, "ari"]) < 0.2
    cosine = cosine_structure(states, prompts, [1]).set_index("pair")["cosine"]
    assert cosine["toxic-toxic"] > 0.9 > cosine["cross"]


def test_surface_baselines_see_only_the_surface(prompts):
    table = surface_baselines(prompts).set_index("baseline")
    assert table.loc["question-mark", "auroc"] == pytest.approx(0.5)
    assert table.loc["source", "auroc"] == pytest.approx(0.5, abs=0.15)
    assert table.loc["tf-idf", "auroc"] > 0.9  # harm/calm are words
    split = prompts.assign(source=prompts["label"])
    assert surface_baselines(split).set_index("baseline").loc["source", "auroc"] == 1.0


def test_map_is_deterministic(prompts):
    states = planted(prompts, 6.0)
    assert np.array_equal(map_2d(states, 1), map_2d(states, 1)) and map_2d(states, 1).shape == (
        120,
        2,
    )


def test_one_class_is_refused(prompts):
    with pytest.raises(DCRError, match="at least 2 toxic prompts, got 0"):
        surface_baselines(prompts[prompts.label != "toxic"])


def test_auroc_is_the_library_s_and_ties_count_half():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    y, scores, groups = (
        rng.integers(2, size=90),
        rng.normal(size=90).round(1),
        np.repeat(np.arange(30), 3),
    )
    found = auroc_interval(y, scores + 0.8 * y, groups)
    assert found["auroc"] == pytest.approx(roc_auc_score(y, scores + 0.8 * y))
    assert found["low"] < found["auroc"] < found["high"] and found["high"] - found["low"] < 0.4


def forms_set(n: int = 40) -> pd.DataFrame:
    """The paper's confound: toxic imperatives, harmless questions, no pairs."""
    rows = [
        {"id": f"t{i}", "text": f"Take the thing{i} away.", "label": "toxic", "form": "imperative"}
        for i in range(n)
    ]
    rows += [
        {
            "id": f"s{i}",
            "text": f"How do I take item{i} out?",
            "label": "seemingly_toxic",
            "form": "question",
        }
        for i in range(n)
    ]
    return pd.DataFrame(rows).assign(pair_id="", source="one")


@pytest.mark.parametrize("reads, crossed", [("form", 0.1), ("harm", 0.9)])
def test_cells_tell_a_probe_of_form_from_a_probe_of_harm(reads, crossed):
    prompts = forms_set()
    swapped = swap_table(prompts)

    def states(rows, seed):
        values = (
            np.random.default_rng(seed).normal(scale=0.3, size=(1, len(rows), 6)).astype(np.float32)
        )
        values[0, :, 0] += (
            (rows["form"] == "imperative") if reads == "form" else (rows["label"] == "toxic")
        )
        return HiddenStates(values, "last")

    table = probe_by_form(states(prompts, 0), prompts, states(swapped, 1), swapped, 0).set_index(
        ["toxic_form", "harmless_form"]
    )
    assert table.loc[("imperative", "question"), "auroc"] > 0.9  # as published both look perfect
    other = table.loc[("question", "imperative"), "auroc"]
    assert other < crossed if reads == "form" else other > crossed
    assert table.loc[("balanced", "balanced"), "n"] == 4 * len(prompts)


def test_transfer_to_the_swapped_form_never_scores_a_request_it_was_trained_on():
    """States that only name the request: a probe that had seen it would be perfect, one that held it out is at chance."""
    prompts = forms_set(60)
    names = np.random.default_rng(0).normal(size=(1, len(prompts), 100)).astype(np.float32)
    states = HiddenStates(names, "last")
    auroc = transfer_auroc(states, prompts, states, swap_table(prompts), [0])["auroc"].iloc[0]
    assert 0.3 < auroc < 0.7


def test_a_feature_that_says_nothing_is_at_chance_when_groups_are_lopsided():
    """Each group holds one class mostly: a probe's intercept would tell the fold's class ratio, backwards."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "text": f"w{i} {rng.integers(9)}",
            "label": "toxic" if rng.uniform() < (0.9 if g % 2 else 0.2) else "seemingly_toxic",
            "pair_id": f"g{g}",
            "source": "one",
            "form": "statement",
        }
        for g in range(8)
        for i in range(12)
    ]
    assert surface_baselines(pd.DataFrame(rows)).set_index("baseline").loc[
        "source", "auroc"
    ] == pytest.approx(0.5)


# ---- scores without intervals -------------------------------------------------------------------


def test_the_probe_is_the_librarys_with_the_scaler_folded_in():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    states = rng.normal(3.0, rng.uniform(0.1, 5.0, 8), size=(80, 8))
    toxic = (states[:, 0] + rng.normal(size=80) > 3.0).astype(int)
    theirs = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000)
    ).fit(states, toxic)
    probe = fit_probe(states, toxic)
    np.testing.assert_allclose(
        probe.decision_function(states), theirs.decision_function(states), rtol=1e-6, atol=1e-9
    )


def test_the_probe_recovers_a_planted_direction():
    rng = np.random.default_rng(0)
    direction = rng.normal(size=64) / 8
    toxic = rng.integers(2, size=400)
    probe = fit_probe(rng.normal(size=(400, 64)) + 6 * toxic[:, None] * direction, toxic)
    found = probe.weight / np.linalg.norm(probe.weight)
    assert found @ direction / np.linalg.norm(direction) > 0.95


def test_weighted_auroc_is_the_librarys_on_rows_repeated():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(1)
    toxic, scores = rng.integers(2, size=60), rng.normal(size=60).round(1)
    weights = rng.integers(0, 4, size=(5, 60))
    found = auroc(toxic, scores, weights)
    for row, value in zip(weights, found, strict=True):
        again = np.repeat(np.arange(60), row)
        assert value == pytest.approx(roc_auc_score(toxic[again], scores[again]))
    assert auroc(toxic, scores) == pytest.approx(roc_auc_score(toxic, scores))
    assert np.isnan(auroc(toxic, scores, toxic)) and auroc([0, 1], [0.0, 0.0]) == 0.5


def test_scores_by_layer_are_held_out_and_points_read_them(prompts):
    scores = layer_scores(planted(prompts, 6.0), prompts)
    assert scores.shape == (120, 2) and scores.index.equals(prompts.index)
    table = points(prompts, scores).set_index("name")
    assert table.loc[1, "auroc"] > 0.97 and 0.3 < table.loc[0, "auroc"] < 0.7
    assert list(surface_scores(prompts)) == ["question-mark", "length", "source", "tf-idf"]


def test_a_request_stays_in_one_fold(prompts):
    """States that name the request, prompts without pair ids: only the column `request` can hold them together."""
    rng, rows = np.random.default_rng(0), prompts.assign(request=groups_of(prompts), pair_id="")
    which = pd.factorize(rows["request"])[0]
    values = rng.normal(size=(30, 40))[which][None].astype(np.float32)
    y = (rows["request"].map(dict(zip(rows["request"].unique(), range(30)))) % 2).astype(bool)
    rows["label"] = np.where(y, "toxic", "seemingly_toxic")
    held = layer_scores(HiddenStates(values, "last"), rows)
    assert auroc(y, held[0]) < 0.75
    free = layer_scores(HiddenStates(values, "last"), rows.assign(request=range(120)))
    assert auroc(y, free[0]) > 0.9


def test_transfer_reads_unseen_sources_with_the_mean_of_the_folds(prompts):
    other = prompts.assign(pair_id="", id=[f"o{i}" for i in range(120)], source="two")
    scores = transfer_scores(
        planted(prompts, 6.0), prompts, planted(other, 6.0, seed=1), other, [1]
    )
    assert points(other, scores).loc[0, "auroc"] > 0.97


def test_best_layer_finds_the_planted_one_and_breaks_ties_by_loss(prompts):
    toxic = (prompts["label"] == "toxic").to_numpy()
    values = np.random.default_rng(0).normal(size=(6, 120, 16)).astype(np.float32)
    for layer, gap in ((0, 99.0), (2, 20.0), (3, 40.0), (5, 99.0)):  # 0 and 5 are no candidates
        values[layer, :, :4] += gap * toxic[:, None]
    layer, table = best_layer(HiddenStates(values, "last"), prompts)
    assert table.set_index("layer")["auroc"].loc[[2, 3]].tolist() == [1.0, 1.0]
    assert layer == 3 and table["layer"].tolist() == [1, 2, 3, 4]
