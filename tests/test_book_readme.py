"""The README's numbers come from tables: blocks as the tables give them, and no other number."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fake_run
import pandas as pd
import pytest

from dcr.book import readme
from dcr.errors import DCRError

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "figures" / "reference"
TEXT = """above
<!-- claims: written by `dcr readme` -->
<!-- end -->
between
<!-- practice: written by `dcr readme` -->
0.123
<!-- end -->
below
"""
VERSION = r"\d+\.\d+(B|b)|[Qq]wen2\.5[-\w.]*|Python 3\.\d+|\d{4}\.\d{5}|version 0\.1|(Apache|CC-BY)-\d\.\d"


def standing():
    """Three methods, in another order than shown; a measure that the README leaves out."""
    columns = [*readme.COLUMNS, "training, s ↓"]
    pairs = [(m, c) for m in ("STL", "base", "Gate") for c in columns]
    rows = pd.DataFrame(pairs, columns=["method", "column"])
    rows["value"] = [i / 100 for i in range(len(rows))]
    return rows.assign(low=rows["value"] - 0.01, high=rows["value"] + 0.01, n=9, seeds=1)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    folder = tmp_path / "figures" / "reference"
    folder.mkdir(parents=True)
    fake_run.tables()["claims"].to_csv(folder / "claims.csv", index=False)
    for name in ("frontier", "frontier_differences"):
        fake_run.tables()[name].to_csv(folder / f"{name}.csv", index=False)
    standing().to_csv(folder / "standing.csv", index=False)
    manifest = {"model": {"name": "embedded"}, "methods": ["a", "b"], "seeds": [0, 1]}
    config = {"every_seed": ["c", "b"], "data": {"answered": 24}}
    config |= {"generation": {"max_new_tokens": 16}}
    manifest |= {"data": {"test": {"rows": 400}}, "config": config}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "README.md").write_text(TEXT)
    monkeypatch.setattr(readme, "CHECKOUT", tmp_path)
    return tmp_path


def test_blocks_are_filled_from_tables_and_the_rest_is_kept(checkout):
    path = readme.readme()
    text = path.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "\nbetween\n" in text
    assert (
        "2 methods, 2 seeds (one seed of a); 400 test prompts are scored" in text
        and "24 requests a set are answered in 16 tokens" in text
        and "0.123" not in text
    )
    claims = fake_run.tables()["claims"]
    assert all(f"{v:.2f} [" in text for v in claims["value"])
    rows = [
        line.split(" | ") for line in text.splitlines() if re.match(r"\| (Gate|STL|base) ", line)
    ]
    # In the README's order, with the number of seeds.
    assert [row[0].strip("| ") for row in rows] == ["Gate (1)", "STL (1)"]
    less = fake_run.tables()["frontier_differences"].query("method == 'DCR' and against == 'STL'")
    assert f"let through: {less['difference'].iloc[0]:.2f} [" in text
    shown = standing().query("method == 'STL' and column != 'training, s ↓'")["value"]
    assert [float(cell.split(" [")[0]) for cell in rows[1][1:]] == shown.tolist()
    assert all(name in text for name in readme.COLUMNS.values()) and "training" not in text
    assert readme.readme(check=True) == path and path.read_text() == text


def test_check_finds_a_number_that_the_tables_do_not_give(checkout):
    path = readme.readme()
    path.write_text(path.read_text().replace("400 test", "500 test"))
    with pytest.raises(DCRError, match="says what figures/reference does not; run: dcr readme"):
        readme.readme(check=True)


def test_unknown_block_and_missing_table(checkout):
    (checkout / "README.md").write_text(TEXT.replace("claims:", "clams:"))
    with pytest.raises(DCRError, match="'clams' is unknown; known: claims, practice"):
        readme.readme()
    (checkout / "README.md").write_text(TEXT)
    (checkout / "figures" / "reference" / "standing.csv").unlink()
    with pytest.raises(DCRError, match="standing.csv is missing: dcr table standing"):
        readme.readme()


def test_no_number_stands_outside_the_blocks():
    text = readme.BLOCK.sub("", (ROOT / "README.md").read_text(encoding="utf-8"))
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
    assert not re.findall(r"\d*\.\d+", re.sub(VERSION, "", text))


def test_the_committed_readme_says_what_the_committed_tables_give():
    readme.readme(check=True)
