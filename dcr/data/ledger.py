"""The ledger: every prompt that an experiment may touch, once, with its request and the one role that the request plays.

A role hangs on the request's words and on the registry's shares alone: not on method, seed, form, limits or company.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pandas as pd

from dcr.config import Config, load_config, methods_file, profiles
from dcr.data.files import cache_dir, content_key, sha256_of, write_atomic
from dcr.data.forms import core
from dcr.data.pairs import requests_of
from dcr.data.read import COLUMNS, prompts_of
from dcr.data.sources import BUNDLED, SOURCES, load, load_bundled, path_of, source
from dcr.errors import DCRError

log = logging.getLogger("dcr")
# Where a request occurs under several roles, the first of these takes it.
ROLES = ("refine", "align", "anchor", "validation", "test")
# The kit's own data: committed split → shares. Training topics are dealt whole, so that stages share none.
BUNDLED_ROLES = {
    "train": {"refine": 0.42, "align": 0.43, "anchor": 0.15},
    "validation": {"validation": 1.0},
    "test": {"test": 1.0},
    "style": {"test": 1.0},
}
# Names of benchmarks in it: table, split, label.
BUNDLED_SETS = {
    f"{name}-{side}": ("pairs", split, label)
    for name, split in (("pairs", "test"), ("style", "style"), ("validation", "validation"))
    for side, label in (("safe", "seemingly_toxic"), ("toxic", "toxic"))
} | {
    "general-test": ("general", "test", "general"),
    "general-validation": ("general", "validation", "general"),
}
ANCHORS = {"harmful": "advbench", "pseudo": "or-bench"}  # published sources of anchors


def names_in(setting: str) -> list[str]:
    """The sources of a setting: "safety-only+bundled" names two tables read as one; a file's path stays whole."""
    return [setting] if Path(setting).is_file() else [n.strip() for n in setting.split("+")]


def named(config: Config) -> dict[str, dict[str, str]]:
    """source → {role it is named for: class it is named as} of one configuration; the bundled data stay out."""
    data = config.data
    settings = [
        ("refine", data.toxic, "toxic"),
        ("refine", data.seemingly_toxic, "seemingly_toxic"),
        ("align", data.align_toxic, "toxic"),
        ("align", data.general, "general"),
        *(("test", name, "") for name in data.benchmarks),
        *(("validation", name, "") for name in data.validation),
    ]
    if config.align.n_augment and config.align.augment_source != "pairs":
        settings.append(("align", config.align.augment_source, "seemingly_toxic"))
    if data.toxic != "bundled":
        settings += [("anchor", name, "") for name in ANCHORS.values()]
    found: dict[str, dict[str, str]] = {}
    for role, setting, label in settings:
        for name in names_in(setting):
            if name != "bundled" and name not in BUNDLED_SETS:
                found.setdefault(name, {})[role] = label
    return found


def ledger(config: Config, of: Sequence[Config] = ()) -> pd.DataFrame:
    """Every prompt of every source that `config`, `of` or a method of methods.yaml on top of them names.

    of: the configurations whose comparison this is for (default: the profile of `config`); give an experiment's own
    configuration for the recipes of its methods, so that all of them share one ledger.
    Columns: those of a prompt table, `table` (the source's registry name), `topic`, `why`. `role` is one of
    ROLES, or "" with the reason in `why` for a prompt that is left out. Cached on disk.
    Raises DCRError for a source that the registry does not allow the role that it is named for.
    """
    base = list(of) or [config, *_profile(config)]
    recipes = [c.override(m.get("overrides") or {}) for c in base for m in methods_file().values()]
    uses: dict[str, dict[str, str]] = {}
    for one in (config, *base, *recipes):
        for name, roles in named(one).items():
            uses.setdefault(name, {}).update(roles)
    tables = {
        name: (tuple(_shares(name, roles).items()), _label(name, roles))
        for name, roles in sorted(uses.items())
    }
    files = {n: sha256_of(path_of(n) if n in SOURCES else Path(n)) for n in tables}
    here = Path(__file__).parent
    code = [here / f"{n}.py" for n in ("ledger", "pairs", "forms", "read", "sources")]
    code += [here / "sources.yaml", BUNDLED / "pairs.jsonl", BUNDLED / "general.jsonl"]
    key = content_key({"tables": tables, "files": files, "code": [sha256_of(p) for p in code]})
    return _ledger(key, tuple(tables.items())).copy()


def _profile(config: Config) -> list[Config]:
    return [load_config(config.profile)] if config.profile in profiles() else []


def _shares(name: str, roles: dict[str, str]) -> dict[str, float]:
    """role → share of requests: the registry's, or equal ones of the roles that a user's table is named for."""
    if name not in SOURCES and Path(name).is_file():
        return {role: 1 / len(roles) for role in ROLES if role in roles}
    allowed = source(name).roles
    for role in roles:
        # A benchmark that is trained on (XSTest) is asked all the same: its rates stand apart.
        if not allowed or (role != "test" and role not in allowed):
            raise DCRError(
                f"{name} is named for the role {role!r}; the registry allows it "
                f"{' and '.join(allowed) or 'none'}. Name another source, or give your own table of prompts."
            )
    return allowed


def _label(name: str, roles: dict[str, str]) -> str:
    """The one class that a user's table is named as, or "" where its own column says."""
    classes = set(roles.values()) - {""}
    return classes.pop() if name not in SOURCES and len(classes) == 1 else ""


@lru_cache(maxsize=4)
def _ledger(key: str, tables: tuple) -> pd.DataFrame:
    path = cache_dir() / "ledger" / f"{key}.parquet"
    if path.is_file():
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError):
            log.warning("%s is broken and made again", path)
    rows = _made(tables)
    write_atomic(path, rows.to_parquet(index=False))
    return rows


def _made(tables: tuple) -> pd.DataFrame:
    parts = []
    for name in ("pairs", "general"):
        rows = load_bundled(name).assign(table="bundled")
        parts += [
            part.assign(_shares=[BUNDLED_ROLES[split]] * len(part), _unit=part["topic"])
            for split, part in rows.groupby("split", sort=False)
        ]
    for name, (items, label) in tables:
        rows = load(name) if name in SOURCES else prompts_of(name, label=label)
        if (bare := rows["label"] == "").any():
            raise DCRError(
                f"{name}: row {int(bare.argmax())} has no label. Add a column 'label' (toxic, seemingly_toxic, general)."
            )
        shares = [dict(items)] * len(rows)
        parts.append(rows.assign(table=name, _shares=shares, _unit=requests_of(rows)))
    every = pd.concat(parts, ignore_index=True)
    if every["id"].duplicated().any():
        twice = every[every["id"].duplicated(keep=False)]
        raise DCRError(
            f"id {twice['id'].iloc[0]!r} stands in {' and '.join(twice['table'].iloc[:2])}. Give ids of their own."
        )
    every["request"] = requests_of(every)
    dealt = [
        _deal(unit, shares) for unit, shares in zip(every["_unit"], every["_shares"], strict=True)
    ]
    order = pd.Series([ROLES.index(role) for role in dealt], index=every.index)
    leader = order.groupby(every["request"]).idxmin()  # row that gives each request its role
    leads = every["request"].map(leader)
    role = pd.Series(dealt).iloc[leads.to_numpy()].to_numpy()
    allowed = [r in shares for r, shares in zip(role, every["_shares"], strict=True)]
    every["role"] = [r if fits else "" for r, fits in zip(role, allowed, strict=True)]
    every["why"] = [
        "" if fits else f"its request is {r} as {every['id'].iat[at]}"
        for r, fits, at in zip(role, allowed, leads, strict=True)
    ]
    every["rank"] = [hash_of(core(text)) for text in every["text"]]
    text = ["table", "split", "topic", "kind", "why", "rank"]
    for name in text:
        every[name] = every[name].fillna("") if name in every else ""
    return every[[*COLUMNS, *text]]


def hash_of(text: str) -> str:
    """16 hex digits of the text's sha256: what is drawn hangs on this, never on a generator's state."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _deal(unit: str, shares: dict[str, float]) -> str:
    """The role of one unit: a point in [0, 1) by its hash, laid on the shares in the order of ROLES."""
    point, total = int(hash_of(f"role:{unit}"), 16) / 16**16, sum(shares.values())
    roles = [role for role in ROLES if role in shares]
    for role in roles:
        point -= shares[role] / total
        if point < 0:
            return role
    return roles[-1]
