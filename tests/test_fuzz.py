"""Readers, forms and overrides for minutes, on anything: no exception but DCRError, and what is
read is whole."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import time

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_config import override_texts
from test_read import check, contents, json_values, suffixes

from dcr.config import Config, methods_file, parse_overrides, parse_seeds
from dcr.data.forms import FORMS, core, form_of, swap_form, swap_table
from dcr.data.read import COLUMNS, LABELS, MISSING, SUFFIXES, prompts_of
from dcr.errors import DCRError
from dcr.study.grid import load_grid

SECONDS = float(os.environ.get("DCR_TEST_FUZZ_SECONDS", "600"))
TASKS = {}  # name → a function that tries so many examples
FIELDS = {
    f"{section}.{field}"
    for section, part in Config()
    if hasattr(part, "replaced")
    for field in type(part).model_fields
}

words = st.sampled_from(
    "How do I kill the lights ? . ! Can you please tell me \n \t é 😀 ' \"".split(" ")
)
prose = st.lists(words, max_size=12).map(" ".join)
texts = st.one_of(
    st.text(max_size=40), prose, st.sampled_from(["", "...", "?", "'", "Mr. ", *MISSING])
)
names = st.sampled_from([*COLUMNS, "Text", " text", "x", ""])
cells = st.one_of(texts, st.sampled_from([*LABELS, *FORMS]), st.integers(), st.floats(), st.none())
frames = st.lists(names, min_size=1, max_size=4).flatmap(
    lambda head: st.lists(st.tuples(*[cells] * len(head)), max_size=4).map(
        lambda rows: pd.DataFrame(rows, columns=head)
    )
)
yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def task(*strategies):
    """Keep a function of a folder and of one example of each strategy among the tasks."""

    def keep(function):
        def tried(folder, **options):
            options = {"deadline": None, "database": None, **options}
            options["suppress_health_check"] = list(HealthCheck)
            examples = st.tuples(*strategies)
            settings(**options)(given(examples)(lambda example: function(folder, *example)))()

        TASKS[function.__name__] = tried
        return function

    return keep


def refused(task, *arguments):
    """Whether our own error, in one line, came instead of a result."""
    try:
        task(*arguments)
    except DCRError as error:
        assert str(error).strip() and "\n" not in str(error).strip()
        return True
    return False


@task(suffixes, contents)
def files(folder, suffix, content):
    check(folder, suffix, content)


@task(
    frames,
    st.sampled_from(SUFFIXES),
    st.booleans(),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]),
)
def written(folder, frame, suffix, packed, encoding):
    """Tables as pandas writes them, in every format and encoding."""
    try:
        if suffix == ".parquet":
            raw = io.BytesIO()
            frame.to_parquet(raw)
            content = raw.getvalue()
        elif suffix in (".json", ".jsonl"):
            content = frame.to_json(orient="records", lines=suffix == ".jsonl").encode(encoding)
        else:
            content = frame.to_csv(index=False, sep="\t" if suffix == ".tsv" else ",").encode(
                encoding
            )
    except Exception:  # what pandas cannot write
        return
    check(folder, suffix[1:] + ".gz" * packed, gzip.compress(content) if packed else content)


@task(
    json_values
    | frames
    | st.lists(texts, max_size=4).map(np.array)
    | st.lists(cells, max_size=4).map(pd.Series)
)
def values(folder, value):
    if not refused(prompts_of, value):
        table = prompts_of(value)
        assert (
            table["text"].str.strip().ne("").all() and not table[list(COLUMNS)].isna().any().any()
        )


@task(texts)
def forms(folder, text):
    assert form_of(text) in FORMS and isinstance(core(text), str)
    if refused(prompts_of, [text]):
        return
    table = prompts_of([text])
    (swapped,) = swap_table(table).to_dict("records")
    assert swapped["text"] == swap_form(table["text"][0]) and swapped["text"].strip()
    question = table["form"][0] == "question"
    assert (swapped["form"] == "question") != question


@task(override_texts | st.text(max_size=30), st.sampled_from(sorted(FIELDS)), yaml_values)
def overrides(folder, text, field, value):
    for given_text in (text, f"{field}={text}", {field: value}, {text: value}):
        refused(lambda o: Config().override(parse_overrides(o)), given_text)


@task(json_values | st.text(alphabet="0123456789-, x", max_size=8))
def seeds(folder, value):
    if not refused(parse_seeds, value):
        assert all(isinstance(s, int) and s >= 0 for s in parse_seeds(value))


@task(
    st.dictionaries(
        st.sampled_from(["profile", "method", "seeds", "base", "grid", "recipes", "align", "x"]),
        yaml_values
        | st.dictionaries(
            st.sampled_from([*sorted(FIELDS), *methods_file()]), yaml_values, max_size=2
        ),
        max_size=5,
    )
)
def grids(folder, content):
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    refused(load_grid, path)


@pytest.mark.parametrize("name", TASKS)
def test_a_few_examples(name, tmp_path):
    TASKS[name](tmp_path, max_examples=25, derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS + 600)
def test_for_minutes(tmp_path):
    """Every kind in turn, with new random examples each time; says how many there were."""
    end, tried = time.monotonic() + SECONDS, dict.fromkeys(TASKS, 0)
    for name in itertools.cycle(TASKS):
        TASKS[name](tmp_path, max_examples=200, phases=[Phase.generate, Phase.shrink])
        tried[name] += 200
        if time.monotonic() > end:
            break
    print(f"{SECONDS:.0f} seconds, examples at most: {tried}")
