"""The ledger: every prompt that an experiment may touch, once, with its request and its one role.

A role hangs on the request's words and the registry's shares alone: not on method, seed, form,
limits or company.
"""

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from dcr.config import Config, load_config, methods_file, profiles
from dcr.data.files import cache_dir, content_key, sha256_of, write_atomic
from dcr.data.pairs import requests_of
from dcr.data.read import COLUMNS, HUB, file_of, prompts_of
from dcr.data.sources import SOURCES, checksum, load, load_bundled, path_of, source
from dcr.errors import DCRError

log = logging.getLogger("dcr")
ROLES = ("refine", "align", "anchor", "validation", "test")  # the first takes what several claim
# The kit's own data: committed split → shares. Training topics are dealt whole: stages share none.
BUNDLED_ROLES = {
    "train": {"refine": 0.42, "align": 0.48, "anchor": 0.10},
    "validation": {"validation": 1.0},
    "test": {"test": 1.0},
    "style": {"test": 1.0},
}
BUNDLED_SETS = {  # benchmark in it → split, label
    "pairs-safe": ("test", "seemingly_toxic"),
    "pairs-toxic": ("test", "toxic"),
    "style-safe": ("style", "seemingly_toxic"),
    "style-toxic": ("style", "toxic"),
    "validation-safe": ("validation", "seemingly_toxic"),
    "validation-toxic": ("validation", "toxic"),
    "general-test": ("test", "general"),
    "general-validation": ("validation", "general"),
}
ANCHORS = {"harmful": "advbench", "pseudo": "or-bench"}  # published sources of anchors
KEPT = 20  # ledgers on disk, the newest
EXTRA = ("table", "split", "topic", "kind", "why")


def names_in(setting: str) -> list[str]:
    """The sources of a setting: "safety-only+bundled" names two; a file's path stays whole. Twice
    named is named once."""
    names = [setting] if file_of(setting) else [n.strip() for n in setting.split("+")]
    return list(dict.fromkeys(names))


def trains_on_published(config: Config) -> bool:
    """Whether stage 1's toxic prompts come from a registered source; anchors do so then too."""
    return any(name in SOURCES for name in names_in(config.data.toxic))


def ledger(config: Config, of: Sequence[Config] = ()) -> pd.DataFrame:
    """Every prompt of every source that `config`, `of` or a method on top of them names.

    of: the configurations that share the ledger (default: the profile of `config`); an experiment
        gives its own for the recipes of its methods.
    Columns: a prompt table's, and table (name of the source), split, topic, kind, why. role is one
    of ROLES, or "" for a prompt that is left out, with the reason in `why`.
    Kept on disk under all that it depends on. Raises DCRError for a source in a role that the
    registry does not allow it.
    """
    return _kept(*ledger_key(config, of)).copy()


def ledger_key(config: Config, of: Sequence[Config] = ()) -> tuple[str, tuple]:
    """(key over the files of all sources and the code, the sources) of `ledger`; raises as it."""
    profile = [load_config(config.profile)] if config.profile in profiles() else []
    base = [config, *(of or profile)]
    methods = [method.get("overrides") or {} for method in methods_file().values()]
    uses: dict[str, dict[str, set[str]]] = {}  # source → role → classes
    for one in (*base, *(c.override(m) for c in base[1:] or base for m in methods)):
        for name, role, label in _named(one):
            uses.setdefault(name, {}).setdefault(role, set()).add(label)
    tables = tuple((n, _shares(n, roles), *_label(n, roles)) for n, roles in sorted(uses.items()))
    code = [p for p in Path(__file__).parent.rglob("*.*") if p.suffix in (".py", ".yaml", ".jsonl")]
    key = {
        "tables": tables,
        "files": {name: _fingerprint(name) for name in uses},
        "code": [checksum(path) for path in sorted(code)],
    }
    return content_key(key), tables


def _named(config: Config) -> list[tuple[str, str, str]]:
    """(source, role, class or "") that one configuration names; the bundled data stay out."""
    data, align = config.data, config.align
    settings = [
        (data.toxic, "refine", "toxic"),
        (data.seemingly_toxic, "refine", "seemingly_toxic"),
        (data.align_toxic, "align", "toxic"),
        (data.general, "align", "general"),
        *((name, "test", "") for name in data.benchmarks),
        *((name, "validation", "") for name in data.validation),
    ]
    if align.n_augment and align.augment_source != "pairs":
        settings.append((align.augment_source, "align", "seemingly_toxic"))
    if trains_on_published(config):
        settings += [(name, "anchor", "") for name in ANCHORS.values()]
    ours = ("bundled", *BUNDLED_SETS)
    return [(n, role, label) for s, role, label in settings for n in names_in(s) if n not in ours]


def _shares(name: str, roles: dict[str, set[str]]) -> tuple[tuple[str, float], ...]:
    """(role, share of requests): the registry's, or equal ones of a user's table's roles."""
    if name not in SOURCES and (file_of(name) or HUB.fullmatch(name)):
        return tuple((role, 1 / len(roles)) for role in ROLES if role in roles)
    allowed = source(name).roles
    for role in roles:
        if role not in allowed and not (role == "test" and stands_apart(name)):
            raise DCRError(
                f"{name} is named for {role}, but the registry keeps it for "
                f"{' and '.join(allowed) or 'no role'}. Name another source or your own table."
            )
    return tuple((role, allowed[role]) for role in ROLES if role in allowed)


def stands_apart(name: str) -> bool:
    """Whether a source is for training alone (XSTest): as a benchmark its rates stand apart."""
    return name in SOURCES and set(SOURCES[name].roles) == {"refine"}


def _label(name: str, roles: dict[str, set[str]]) -> tuple[str, bool]:
    """(the one class that a user's table is named as, or "" where its own column says; whether it
    is asked too, with all classes that it holds)."""
    classes = set().union(*roles.values())
    named = [] if name in SOURCES else sorted(classes - {""})
    return named[0] if len(named) == 1 else "", "" in classes


def _fingerprint(name: str) -> str:
    if name in SOURCES:
        return checksum(path_of(name))
    if path := file_of(name):
        return sha256_of(path)
    if (match := HUB.fullmatch(name)) and len(match["revision"]) < 40:
        raise DCRError(f"{name}: {match['revision']} may move. Name a commit of 40 digits.")
    return name


@lru_cache(maxsize=4)
def _kept(key: str, tables: tuple) -> pd.DataFrame:
    path = cache_dir() / "ledger" / f"{key}.parquet"
    if path.is_file():
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError):
            log.warning("%s is broken and made again", path)
    rows = _made(tables)
    write_atomic(path, rows.to_parquet(index=False))
    with contextlib.suppress(OSError):  # another process may prune too
        for old in sorted(path.parent.glob("*.parquet"), key=lambda p: p.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    return rows


def _made(tables: tuple) -> pd.DataFrame:
    parts = []  # (rows, shares, unit that is dealt whole)
    for name in ("pairs", "general"):
        rows = load_bundled(name).assign(table="bundled")
        for split, shares in BUNDLED_ROLES.items():
            part = rows[rows["split"] == split]
            parts.append((part, shares, part["topic"]))
    for name, pairs, label, asked in tables:
        rows = load(name) if name in SOURCES else prompts_of(name, label=label, others=asked)
        if (bare := rows["label"] == "").any():
            raise DCRError(
                f"{name}: row {int(bare.argmax())} has no label. Add a column 'label' (toxic, "
                "seemingly_toxic, general)."
            )
        parts.append((rows.assign(table=name), dict(pairs), requests_of(rows)))
    every = pd.concat([rows for rows, *_ in parts], ignore_index=True)
    for name in EXTRA:
        every[name] = every[name].astype(object).fillna("").astype(str) if name in every else ""
    if (twice := every["id"].duplicated()).any():
        same = every[every["id"] == every.loc[twice, "id"].iloc[0]]
        where = f"{same['id'].iloc[0]!r} stands in {' and '.join(same['table'])}"
        raise DCRError(f"id {where}. Give each table ids of its own.")
    every["request"] = requests_of(every)
    dealt = [ROLES.index(_deal(u, shares)) for _, shares, units in parts for u in units]
    allowed = [shares for rows, shares, _ in parts for _ in range(len(rows))]
    # Every request takes the first of the roles that its prompts were dealt.
    leaders = every["request"].map(pd.Series(dealt).groupby(every["request"]).idxmin()).tolist()
    roles = [ROLES[dealt[lead]] for lead in leaders]
    fits = np.array([role in shares for role, shares in zip(roles, allowed, strict=True)])
    why = "its request has the role " + pd.Series(roles) + " as " + every["id"].iloc[leaders].array
    every["role"], every["why"] = np.where(fits, roles, ""), why.mask(fits, "")
    return every[[*COLUMNS, *EXTRA]]


def hash_of(text: str) -> str:
    """16 hex digits of sha256: what is drawn hangs on this, never on a generator's state."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _deal(unit: str, shares: dict[str, float]) -> str:
    """The role of one unit: a point in [0, 1) by its hash, laid on the shares."""
    point = int(hash_of(f"role:{unit}"), 16) / 16**16 * sum(shares.values())
    for role, share in shares.items():
        point -= share
        if point < 0:
            return role
    return role
