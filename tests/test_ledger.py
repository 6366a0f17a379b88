"""The ledger's promises as properties over random configurations, and what is drawn from it.

Bundled data; the published sets too where DCR_DATA_DIR is set (CI sets it).
"""

from __future__ import annotations

import os
import time

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcr.config import load_config, methods_file, profiles
from dcr.data import ledger as ledger_module
from dcr.data import sets, sources
from dcr.data.forms import form_of, swap_form, swap_table
from dcr.data.ledger import ROLES, ledger
from dcr.data.sources import SOURCES, audit, load_bundled
from dcr.errors import DCRError
from dcr.study.experiment import Experiment

PUBLISHED = "DCR_DATA_DIR" in os.environ
needs_upstream = pytest.mark.skipif(not PUBLISHED, reason="needs DCR_DATA_DIR")
PROFILES = ["quick", "embedded", *(["reference-135m"] if PUBLISHED else [])]
BUNDLED = ["pairs-safe", "pairs-toxic", "style-safe", "style-toxic", "general-test"]
OURS = {
    "data.toxic": "bundled",
    "data.seemingly_toxic": "bundled",
    "data.align_toxic": "bundled",
    "data.general": "bundled",
    "data.benchmarks": BUNDLED,
}
UPSTREAM = {
    "data.toxic": "safety-only",
    "data.seemingly_toxic": "xstest-safe",
    "data.align_toxic": "safety-only",
    "data.general": "alpaca-demo",
    "data.validation": ["validation-safe", "oktest-heldout", "coconot", "q-harm", "i-malicious"],
    "data.benchmarks": [
        *("oktest", "or-bench", "or-80k", "phtest", "coconot", "xstest-safe", "pairs-safe"),
        *("advbench", "malicious-instruct", "q-harm", "harmful-val", "i-malicious"),
    ],
}
random_overrides = st.fixed_dictionaries(
    {
        "data.audited": st.booleans(),
        "data.form_mix": st.sampled_from([0.0, 0.5]),
        "data.n_toxic": st.integers(0, 100),
        "data.n_seemingly_toxic": st.integers(0, 100),
        "data.limit": st.integers(1, 12),
        "align.n_safe": st.integers(1, 100),
        "align.n_general": st.integers(0, 100),
        "align.form_mix": st.sampled_from([0.0, 0.3, 1.0]),
        "evaluation.forms": st.booleans(),
        "evaluation.forms_limit": st.integers(0, 9),
    }
)
configs = st.builds(
    lambda sources, few, seed: load_config("quick", overrides={**sources, **few}).override(
        {"seed": seed}
    ),
    st.sampled_from([OURS, UPSTREAM] if PUBLISHED else [OURS]),
    random_overrides,
    st.integers(0, 5),
)
methods = st.sampled_from(sorted(methods_file()))
many = settings(max_examples=6, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of the module's own: random configurations would fill the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DCR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def recipe(config, method):
    return config.override(methods_file()[method].get("overrides") or {})


@many
@given(configs, methods, methods)
def test_methods_with_one_source_align_on_one_sample(config, a, b):
    """Row for row where neither is audited; with an audit on one side, a part of the other."""
    one, two = recipe(config, a), recipe(config, b)
    if (one.data.align_toxic, one.align) != (two.data.align_toxic, two.align):
        two = two.replaced(
            align=one.align, data=two.data.replaced(align_toxic=one.data.align_toxic)
        )
    x, y = (sets.training_sets(c, of=[config]).mix.query("part == 'safe'") for c in (one, two))
    if one.data.audited == two.data.audited:
        pd.testing.assert_frame_equal(x, y)
    few, most = (x, y) if one.data.audited else (y, x)
    assert few["id"].isin(most["id"]).all()
    assert most[most["id"].isin(few["id"])]["id"].tolist() == few["id"].tolist()


@needs_upstream
def test_an_audit_takes_from_the_same_sample_what_it_marks():
    config = load_config("quick", overrides=UPSTREAM | {"align.n_safe": 400, "data.n_toxic": 400})
    plain, audited = (
        sets.training_sets(config.override({"data.audited": a})) for a in (False, True)
    )
    for x, y in ((plain.mix, audited.mix), (plain.toxic, audited.toxic)):
        kept = x[x["id"].map(audit()).fillna("harmful") == "harmful"]
        assert 100 < len(y) < len(x) and y["id"].tolist() == kept["id"].tolist()


@pytest.mark.parametrize(
    "profile",
    [pytest.param(p, marks=() if p in PROFILES else pytest.mark.slow) for p in profiles()],
)
def test_the_methods_of_a_profile_share_their_refusal_rows(profile, tmp_path):
    """As notebook 03 shows: one sample wherever the source is one; an audit takes a part of it.

    Ordinary instructions are no refusals: where alpaca is not at hand, its demo stands for it.
    """
    present = sources.list_sources().set_index("name")["present"]
    general = "alpaca" if present["alpaca"] else "alpaca-demo"
    stand_in = {"data.general": general, "align.n_general": 100}
    overrides = stand_in if load_config(profile).data.general == "alpaca" else {}
    config = load_config(profile, overrides=overrides)
    needed = {name for name, *_ in ledger_module._named(config)}
    if absent := sorted(n for n in needed if not present.get(n, True)):
        pytest.skip(f"not at hand: {', '.join(absent)}")
    rows = Experiment(profile, run_dir=tmp_path, overrides=overrides).table("same_rows")
    aligned = [m for m, r in methods_file().items() if "align" in r.get("stages", [])]
    assert len(rows) == len(aligned) ** 2 and rows["same_source"].all()
    audited = {m: recipe(config, m).data.audited for m in aligned}
    one, other = rows["method"].map(audited), rows["other"].map(audited)
    assert (rows.loc[one == other, "relation"] == "same").all()
    assert (rows.loc[one == other, "share"] == 1).all()
    within = {"same", "subset"} if config.data.align_toxic == "safety-only" else {"same"}
    assert set(rows.loc[one & ~other, "relation"]) <= within
    assert (rows.loc[one & ~other, "share"] == 1).all()
    fewer = rows[~one & other]
    assert (fewer["shared"] == fewer["n_other"]).all(), "all of the audited are among the others"
    assert (fewer["share"] == fewer["n_other"] / fewer["n"]).all()


@many
@given(configs, st.integers(0, 9), methods, st.integers(1, 30))
def test_test_prompts_hang_on_no_seed_method_or_limit(config, seed, method, limit):
    other = recipe(config.override({"seed": seed}), method)
    for asked in (sets.test_prompts, sets.validation_prompts):
        every = asked(config, of=[config])
        pd.testing.assert_frame_equal(every, asked(other, of=[config]))
        few = asked(config.override({"data.limit": limit}), of=[config])
        for name, rows in few.groupby("benchmark"):
            taken = sorted(rows["request"].unique())
            whole = sorted(every.loc[every["benchmark"] == name, "request"].unique())
            common = min(len(taken), len(whole))
            assert taken[:common] == whole[:common] and len(taken) <= limit
    assert sets.test_prompts(config, of=[config])["id"].is_unique


@settings(max_examples=2, deadline=None)
@given(st.sets(st.sampled_from((UPSTREAM if PUBLISHED else OURS)["data.benchmarks"]), min_size=1))
def test_a_sets_prompts_hang_on_no_other_set_that_is_asked(names):
    sources = UPSTREAM if PUBLISHED else OURS
    every = sets.test_prompts(load_config("quick", overrides=sources | {"data.limit": 20}))
    some = {"data.benchmarks": sorted(names), "data.limit": 20}
    few = sets.test_prompts(load_config("quick", overrides=sources | some))
    assert set(few["id"]) == set(every.loc[every["benchmark"].isin(names), "id"])


@many
@given(configs, methods)
def test_stages_and_questions_share_no_request(config, method):
    drawn = sets.training_sets(recipe(config, method), of=[config])
    asked = sets.test_prompts(config, of=[config])
    chosen = sets.validation_prompts(config, of=[config])
    anchors = pd.concat(sets.anchors(config, r, of=[config]) for r in sets.CLASS)
    refine = pd.concat([drawn.toxic, drawn.seemingly_toxic, drawn.general])
    parts = [drawn.mix, refine, anchors, chosen, asked[asked["role"] == "test"]]
    for i, one in enumerate(parts):
        for other in parts[:i]:
            assert not set(one["request"]) & set(other["request"])


@pytest.mark.parametrize("profile", PROFILES)
def test_no_request_has_two_roles_and_what_is_dropped_is_listed(profile):
    config = load_config(profile)
    every = ledger(config)
    played = every[every["role"] != ""]
    assert (played.groupby("request")["role"].nunique() == 1).all()
    assert set(every["role"]) <= {*ROLES, ""} and every["id"].is_unique
    gone = sets.dropped(config)
    assert gone["id"].tolist() == every.loc[every["role"] == "", "id"].tolist()
    by_id = every.set_index("id")
    for prompt, why in zip(gone["id"], gone["why"], strict=True):
        other = by_id.loc[why.split(" as ")[1]]
        assert by_id["request"][prompt] == other["request"] and other["role"]


def test_a_prompts_role_does_not_change_when_its_form_is_swapped(tmp_path):
    rows = load_bundled("general")[["id", "text"]].head(200)
    swapped = rows.assign(text=rows["text"].map(swap_form))
    roles = []
    for name, table in (("a", rows), ("b", swapped)):
        table.assign(id="u" + table["id"], label="general").to_csv(tmp_path / f"{name}.csv")
        path = str(tmp_path / f"{name}.csv")
        config = load_config("quick", overrides=OURS | {"data.general": path})
        config = config.override({"data.validation": ["general-validation", path]})
        every = ledger(config, of=[config])
        roles.append(every[every["table"] == path].set_index("id")[["role", "request"]])
    pd.testing.assert_frame_equal(*roles)
    assert set(roles[0]["role"]) >= {"align", "validation"}


def test_a_users_table_is_divided_among_what_it_is_named_for(tmp_path):
    path = tmp_path / "mine+yours.csv"
    texts = [f"Tell me about topic{i} and thing{i}" for i in range(60)]
    label = ["toxic"] * 30 + ["seemingly_toxic"] * 30
    pd.DataFrame({"text": texts, "label": label}).to_csv(path)
    names = ("data.toxic", "data.seemingly_toxic", "data.benchmarks", "data.align_toxic")
    given = {n: [str(path)] if n == "data.benchmarks" else str(path) for n in names}
    config = load_config("quick", overrides=OURS | given | {"align.n_safe": 2, "data.limit": 0})
    drawn, asked = sets.training_sets(config), sets.test_prompts(config)
    assert set(drawn.toxic["label"]) == {"toxic"} and len(drawn.seemingly_toxic) > 3
    asked = asked.query("version == 'published'")
    assert set(asked["benchmark"]) == {"mine+yours-toxic", "mine+yours-safe"}
    assert (asked["benchmark"].str.endswith("toxic") == (asked["label"] == "toxic")).all()
    assert (drawn.mix.query("part == 'safe'")["response"] == sets.PLAIN_REFUSAL).all()
    with pytest.raises(DCRError, match="row 0 has no label"):
        pd.DataFrame({"text": texts}).to_csv(path)
        ledger(config)
    with pytest.raises(DCRError, match="a/b@main: main may move"):
        ledger(config.override({"data.general": "a/b@main"}))


def test_a_table_that_is_asked_keeps_its_classes_when_it_serves_training_too(tmp_path):
    path = str(tmp_path / "mine.csv")
    texts = [f"Tell me about topic{i} and thing{i}" for i in range(60)]
    labels = ["toxic"] * 20 + ["seemingly_toxic"] * 20 + [""] * 20  # "": what it is named as
    pd.DataFrame({"text": texts, "label": labels}).to_csv(path, index=False)
    config = load_config("quick", overrides=OURS | {"data.benchmarks": [path], "data.toxic": path})
    assert set(sets.test_prompts(config)["benchmark"]) == {"mine-toxic", "mine-safe"}
    assert set(sets.training_sets(config).toxic["label"]) == {"toxic"}


def test_sources_play_only_the_roles_that_the_registry_allows():
    config = load_config("quick", overrides=OURS)
    for field, name, message in (
        ("data.align_toxic", "xstest-unsafe", "xstest-unsafe is named for align.*for refine"),
        ("data.toxic", "or-80k", "or-80k is named for refine.*keeps it for test"),
        ("data.general", "arc-easy", "arc-easy is named for align.*no role"),
        ("data.general", "nowhere", "'nowhere': no such data source"),
    ):
        with pytest.raises(DCRError, match=message):
            ledger(config.override({field: name}))
    with pytest.raises(DCRError, match="safety-only is named for test.*refine and align"):
        ledger(config.override({"data.benchmarks": ["safety-only"]}))
    with pytest.raises(DCRError, match="oktest is named for validation"):
        ledger(config.override({"data.validation": ["oktest"]}))


def test_too_much_and_too_little_is_said():
    config = load_config("quick", overrides=OURS)
    with pytest.raises(DCRError, match="align.n_safe=99999, but only .* of bundled are for align"):
        sets.training_sets(config.override({"align.n_safe": 99999}))
    with pytest.raises(DCRError, match="mix is empty"):
        sets.training_sets(config.override({"align.n_safe": 0, "align.n_general": 0}))

    for setting, asked in (
        ("benchmarks", sets.test_prompts),
        ("validation", sets.validation_prompts),
    ):
        with pytest.raises(DCRError, match=f"data.{setting} names no set"):
            asked(config.override({f"data.{setting}": []}))


def test_a_source_that_is_named_twice_gives_its_prompts_once():
    once = load_config("quick", overrides=OURS)
    names = ("data.toxic", "data.seemingly_toxic", "data.general")
    one, two = (
        sets.training_sets(c)
        for c in (once, once.override(dict.fromkeys(names, "bundled+bundled")))
    )
    for part in ("toxic", "seemingly_toxic", "mix"):
        pd.testing.assert_frame_equal(getattr(one, part), getattr(two, part))


def test_augmented_rows_have_answers_and_leave_the_rest_as_it_is(caplog):
    config = load_config("quick", overrides=OURS)
    plain = sets.training_sets(config).mix
    more = sets.training_sets(config.override({"align.n_augment": 8})).mix
    pd.testing.assert_frame_equal(more[more["part"] != "augment"].reset_index(drop=True), plain)
    extra = more[more["part"] == "augment"]
    assert len(extra) == 8 and set(extra["label"]) == {"seemingly_toxic"}
    assert extra["response"].ne("").all() and set(extra["role"]) == {"align"}
    sets.training_sets(config.override({"align.n_augment": 9999}))
    assert "all are taken" in caplog.text


def test_pairs_come_whole_into_alignment_and_once(caplog):
    config = load_config("quick", overrides=OURS | {"align.n_pairs": 40})
    plain = sets.training_sets(config.override({"align.n_pairs": 0})).mix
    mix = sets.training_sets(config).mix
    assert mix["id"].is_unique and mix["id"].iloc[: len(plain)].tolist() == plain["id"].tolist()
    assert set(mix["part"]) == {"general", "safe", "pairs"} and set(mix["role"]) == {"align"}
    pairs = mix[mix["pair_id"] != ""]
    harmless = pairs[pairs["label"] == "seemingly_toxic"]
    assert (
        len(harmless) == 40
        and harmless["pair_id"].isin(pairs.loc[pairs["label"] == "toxic", "pair_id"]).all()
    )
    gate = sets.anchors(config, "pairs")
    assert gate.groupby(["label", "form"]).size().tolist() == [290] * 4 and gate["id"].is_unique
    assert set(gate["role"]) == {"refine", "align", "anchor"}


def test_stage_one_keeps_both_members_of_a_pair():
    drawn = sets.training_sets(load_config("quick", overrides=OURS))
    assert set(drawn.toxic["pair_id"]) == set(drawn.seemingly_toxic["pair_id"])
    assert drawn.toxic["pair_id"].tolist() == drawn.seemingly_toxic["pair_id"].tolist()
    assert not set(drawn.toxic["topic"]) & set(drawn.mix.query("part == 'safe'")["topic"])


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_mixed_forms_swap_their_share_evenly(share):
    rows = load_bundled("pairs").head(200)
    mixed = sets.mixed_forms(rows, share)
    swapped = mixed["id"].str.endswith("~")
    assert swapped.sum() == 200 * share and swapped.head(100).sum() == 100 * share
    assert mixed["id"].str.rstrip("~").tolist() == rows["id"].tolist()
    assert (mixed["form"] == mixed["text"].map(form_of)).all()
    assert (mixed["form"] != rows["form"]).tolist() == swapped.tolist()
    assert mixed["response"].tolist() == rows["response"].tolist()


def test_swapped_versions_stand_beside_the_published_ones():
    config = load_config("quick", overrides=OURS | {"evaluation.forms": True})
    asked = sets.test_prompts(config.override({"evaluation.forms_limit": 4}))
    assert set(asked["benchmark"]) == set(BUNDLED)
    for _, rows in asked.groupby("benchmark"):
        plain, other = (rows[rows["version"] == v] for v in ("published", "swapped"))
        assert other["request"].nunique() == 4 and other["request"].isin(plain["request"]).all()
        assert other["id"].str.rstrip("~").isin(plain["id"]).all()
    both = swap_table(asked[asked["version"] == "published"])
    assert set(asked.loc[asked["version"] == "swapped", "id"]) <= set(both["id"])


def test_published_forms_are_those_of_the_papers_sets_and_each_request_keeps_both():
    """The same requests as with both forms; a prompt in the other form is the other version."""
    wanted = {"toxic": "imperative", "seemingly_toxic": "question"}
    config = load_config("quick", overrides=OURS | {"evaluation.forms": True})
    natural = config.override({"data.bundled_forms": "both"})
    published = config.override({"data.bundled_forms": "published"})
    asked, was = (sets.test_prompts(c) for c in (published, natural))
    assert set(asked["id"]) == set(was["id"]) and set(asked["text"]) == set(was["text"])
    general = asked["label"] == "general"
    for version, same in (("published", True), ("swapped", False)):
        rows = asked[~general & (asked["version"] == version) & (asked["form"] != "statement")]
        assert ((rows["form"] == rows["label"].map(wanted)) == same).all()
    drawn, before = (sets.training_sets(c) for c in (published, natural))
    for name in ("toxic", "seemingly_toxic"):
        rows, old = getattr(drawn, name), getattr(before, name)
        assert (rows["form"] == wanted[name]).all() and (
            rows["text"].map(form_of) == rows["form"]
        ).all()
        assert rows["request"].tolist() == old["request"].tolist()
        assert old["form"].nunique() == 2
    assert (drawn.mix.query("part == 'safe'")["form"] == "imperative").all()
    paired = published.override({"align.n_pairs": 8})
    pairs = sets.training_sets(paired).mix.query("part == 'pairs'")
    assert (pairs.groupby("pair_id")["form"].nunique() == 1).all() and pairs["form"].nunique() == 2


def test_refusals_by_one_sentence_change_nothing_else():
    config = load_config("quick", overrides=OURS)
    own, plain = (
        sets.training_sets(config.override({"data.refusals": r, "align.n_pairs": 8})).mix
        for r in ("own", "plain")
    )
    toxic = plain["label"] == "toxic"
    assert (plain.loc[toxic, "response"] == sets.PLAIN_REFUSAL).all() and toxic.any()
    assert not (own.loc[toxic, "response"] == sets.PLAIN_REFUSAL).all()
    assert own.drop(columns="response").equals(plain.drop(columns="response"))
    assert own[~toxic].equals(plain[~toxic]) and (~toxic).any()


def test_the_ledger_is_kept_on_disk_and_made_anew_when_broken(tmp_path, monkeypatch):
    monkeypatch.setenv("DCR_CACHE_DIR", str(tmp_path))
    config = load_config("quick", overrides=OURS)
    ledger_module._kept.cache_clear()
    first = ledger(config)
    (kept,) = (tmp_path / "ledger").glob("*.parquet")
    made = []
    monkeypatch.setattr(ledger_module, "_made", lambda tables: made.append(1) or first)
    ledger_module._kept.cache_clear()
    pd.testing.assert_frame_equal(ledger(config), first)
    assert not made
    kept.write_bytes(kept.read_bytes()[:-50])
    ledger_module._kept.cache_clear()
    pd.testing.assert_frame_equal(ledger(config), first)
    assert made
    ledger_module._kept.cache_clear()


def test_the_hash_of_a_table_moves_with_what_training_reads():
    rows = sets.training_sets(load_config("quick", overrides=OURS)).mix
    for column in ("id", "text", "label", "response", "part", "form", "request"):
        other = rows.assign(**{column: ["x", *rows[column].iloc[1:]]})
        assert sets.table_hash(other) != sets.table_hash(rows)
    assert sets.table_hash(rows.assign(category="x")) == sets.table_hash(rows)


@needs_upstream
def test_published_sets_keep_apart_and_fill_the_natural_cells():
    config = load_config("quick", overrides=UPSTREAM | {"data.limit": 0})
    asked = sets.test_prompts(config)
    assert asked.query("benchmark == 'or-80k'")["request"].nunique() == SOURCES["or-80k"].first
    natural = asked.query(
        "version == 'published' and role == 'test' and label != 'general' and form != 'statement'"
    )
    cells = natural.groupby([natural["label"] == "toxic", "form"])["request"].nunique()
    assert len(cells) == 4 and cells.min() >= 150, cells.to_string()
    heldout = sets.validation_prompts(config).query("benchmark == 'oktest-heldout'")
    assert not set(heldout["request"]) & set(asked["request"])  # ten of fifty are OKTest's own
    gone = sets.dropped(config)
    assert (gone.query("table == 'oktest'")["why"].str.contains("oktest-heldout")).sum() >= 10
    assert set(asked.loc[asked["benchmark"] == "xstest-safe", "role"]) == {"refine"}
    assert asked.loc[asked["benchmark"].isin(["or-bench", "advbench"]), "met"].all()
    assert not asked.loc[asked["benchmark"].isin(["or-80k", "oktest", "phtest"]), "met"].any()


@needs_upstream
def test_every_prompt_at_hand_is_grouped_within_seconds(tmp_path, monkeypatch):
    names = [n for n, e in SOURCES.items() if "test" in e.roles or ledger_module.stands_apart(n)]
    monkeypatch.setenv("DCR_CACHE_DIR", str(tmp_path))
    begun = time.perf_counter()
    rows = ledger(load_config("quick", overrides=UPSTREAM | {"data.benchmarks": names}))
    assert len(rows) > 16_000 and time.perf_counter() - begun < 30


@pytest.mark.parametrize(
    "tables, both",
    [
        ({"a/mine.csv": ["toxic"], "b/mine.csv": ["toxic"]}, "mine"),
        ({"a/mine.csv": ["toxic", "general"], "b/mine-toxic.csv": ["toxic"]}, "mine-toxic"),
    ],
)
def test_one_name_for_two_tables_is_refused(tables, both, tmp_path):
    for name, labels in tables.items():
        (tmp_path / name).parent.mkdir()
        ids = [f"{name[0]}{label}" for label in labels]
        texts = [f"Paint {i} {i} {i} on a wall." for i in ids]
        rows = pd.DataFrame({"id": ids, "text": texts, "label": labels})
        rows.to_csv(tmp_path / name, index=False)
    paths = [str(tmp_path / name) for name in tables]
    config = load_config("quick", overrides={"data.benchmarks": paths})
    with pytest.raises(DCRError, match=f"would both be the set '{both}'"):
        sets.test_prompts(config)


def test_a_users_table_may_stand_in_the_home_folder_with_numbers_for_topics(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    texts = [f"Write about number {i * 7919}." for i in range(30)]
    rows = pd.DataFrame({"text": texts, "response": "Yes.", "label": "general", "topic": 3})
    rows.to_json(tmp_path / "own.jsonl", orient="records", lines=True)
    config = load_config("quick", overrides={"data.general": "~/own.jsonl", "align.n_general": 9})
    mine = ledger(config).query("table == '~/own.jsonl'")
    assert len(mine) == 30 and set(mine["topic"]) == {"3"} and set(mine["role"]) == {"align"}
    # It serves alignment alone; steering still has harmless anchors.
    assert set(sets.anchors(config, "harmless")["table"]) == {"bundled"}


@pytest.mark.parametrize("name", ["~nouser/x.csv", "x" * 400, "a\0b"])
def test_texts_that_can_be_no_file_are_no_such_source(name):
    with pytest.raises(DCRError, match="no such"):
        ledger(load_config("quick", overrides={"data.toxic": name}))
