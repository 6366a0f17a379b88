"""The registry of upstream tables (`sources.yaml`): where their files are, and each as a table.

A file comes from `DCR_DATA_DIR`, else the cache, else a checked download over https.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pandas as pd
import yaml

from dcr.data.files import cache_dir, sha256_of, write_atomic
from dcr.data.read import as_table
from dcr.data.rows import SUFFIXES, read_rows, short
from dcr.data.shapes import SHAPES
from dcr.errors import DCRError

BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class Source:
    """One named table, as in `sources.yaml`. sha256 is "" where a revision alone verifies it."""

    name: str
    file: str  # <folder>/<file> below the data folder
    licence: str
    citation: str
    url: str = ""
    sha256: str = ""
    rows: int = 0  # 0 where unknown
    first: int = 0  # so many requests are asked at most; 0: all
    label: str = ""  # class of its prompts; "" for completions
    roles: dict[str, float] = field(default_factory=dict)  # role → share of requests
    columns: dict[str, str] = field(default_factory=dict)  # ours ← theirs
    keep: dict[str, str] = field(default_factory=dict)  # rows that have these values
    shape: str = ""  # a function of SHAPES for what is no plain table
    source: str = ""  # what the column `source` says, if not the name
    ids: str = ""  # stem of ids, if not the name
    hub: dict[str, str] = field(default_factory=dict)  # repository, revision, file
    part: dict = field(default_factory=dict)  # file, rows, sha256 of a part that stands for it
    derived: bool = False  # has no download


def _registry() -> dict[str, Source]:
    entries = {}
    for group in yaml.safe_load(Path(__file__).with_name("sources.yaml").read_text("utf-8")):
        for name, own in group["sources"].items():
            upstream = own.pop("path", own["file"])
            own["url"] = f"{group['url']}/{upstream}" if "url" in group else ""
            own["file"] = f"{group['folder']}/{own['file']}"
            if part := own.get("part"):
                part["file"] = f"{group['folder']}/{part['file']}"
            about = {key: group[key] for key in ("licence", "citation")}
            entries[name] = Source(name=name, **about, **own)
    return entries


SOURCES: dict[str, Source] = _registry()


def source(name: str) -> Source:
    """The registry entry. Raises DCRError listing the known names."""
    if name not in SOURCES:
        problem = "no such file" if name.lower().endswith(SUFFIXES) else "no such data source"
        raise DCRError(f"{name!r}: {problem}. Give a table's path or one of {', '.join(SOURCES)}.")
    return SOURCES[name]


# ---- files ------------------------------------------------------------------------------------


def data_dir() -> Path:
    """`DCR_DATA_DIR`, else the cache's data folder. Raises DCRError when it is no folder."""
    given = os.environ.get("DCR_DATA_DIR")
    if given and not Path(given).expanduser().is_dir():
        raise DCRError(
            f"DCR_DATA_DIR={given} is no folder. Point it at a folder laid out as "
            "<dataset>/<file>, or unset it to download."
        )
    return Path(given).expanduser().absolute() if given else cache_dir() / "data"


def _found(entry: Source) -> tuple[Path, dict] | None:
    """(file, {file, rows, sha256}) of a source that is at hand, whole or in part."""
    whole = {"file": entry.file, "rows": entry.rows, "sha256": entry.sha256}
    for folder in dict.fromkeys((data_dir(), cache_dir() / "data")):
        for version in filter(None, (whole, entry.part)):
            if (path := folder / version["file"]).is_file():
                return path, version
    return None


def _verified(name: str, download: bool = True) -> tuple[Path, dict]:
    entry = source(name)
    if download and not _found(entry):
        _download(entry, cache_dir() / "data" / entry.file)
    if not (found := _found(entry)):
        raise DCRError(
            f"{name}: {entry.file} is neither in {data_dir()} nor in the cache. Run: "
            f"dcr data fetch {name}"
        )
    path, version = found
    if version["sha256"] not in ("", checksum(path)):
        raise DCRError(
            f"{path}: sha256 differs from the registry's for {name} (truncated, edited or another "
            f"version). Delete it and run: dcr data fetch {name}"
        )
    return found


_checksums: dict[tuple, str] = {}


def checksum(path: Path) -> str:
    """sha256 of a file, read again only when it has changed."""
    key = (path, path.stat().st_mtime_ns, path.stat().st_size)
    if key not in _checksums:
        _checksums[key] = sha256_of(path)
    return _checksums[key]


def path_of(name: str, *, download: bool = True) -> Path:
    """The verified file of a source. Raises DCRError when it is missing or differs."""
    return _verified(name, download)[0]


def _download(entry: Source, target: Path) -> None:
    """Fetch one source's file, whole or not at all."""
    place = "{repository} at {revision}".format(**entry.hub) if entry.hub else entry.url
    if entry.derived:
        raise DCRError(
            f"{entry.name}: {entry.file} is derived from {place} and has no download. Point "
            "DCR_DATA_DIR at a folder that has it."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if entry.hub:
            _from_hub(target, **entry.hub)
        else:
            retrieve(entry.url, target, entry.sha256)
    except Exception as error:  # whatever the hub client, pooch and requests raise
        raise DCRError(
            f"{entry.name}: {place} could not be fetched ({short(error)}). Check the network "
            f"and, for gated sets, HF_TOKEN; or place the file at {target}."
        ) from error


def _from_hub(target: Path, repository: str, revision: str, file: str) -> None:
    """Copy a file of the hub to `target`; the commit it came from is kept beside it."""
    from huggingface_hub import hf_hub_download

    found = hf_hub_download(repository, file, revision=revision, repo_type="dataset")
    commit = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", found)
    write_atomic(_receipt(target), f"{repository}@{commit[1] if commit else revision}")
    write_atomic(target, Path(found).read_bytes())


def _receipt(path: Path) -> Path:
    return path.with_name(path.name + ".revision")


def retrieve(url: str, target: Path, sha256: str, retries: int = 3) -> None:
    """Download to `target` with progress and retries; it appears only whole and right."""
    import pooch

    store = pooch.create(
        target.parent,
        "",
        registry={target.name: f"sha256:{sha256}"},
        urls={target.name: url},
        retry_if_failed=retries,
    )
    store.fetch(target.name, downloader=pooch.HTTPDownloader(progressbar=True, timeout=30))


def provenance(names: Iterable[str]) -> list[dict]:
    """name, file, sha256, read of each source; read: the hub's "repository@commit" or "part"."""
    rows = []
    for name in names:
        path, version = _verified(name)
        read = _receipt(path).read_text() if _receipt(path).is_file() else ""
        read = read if version["file"] == SOURCES[name].file else "part"
        rows.append({"name": name, "file": version["file"], "sha256": checksum(path), "read": read})
    return rows


def list_sources() -> pd.DataFrame:
    """Every source: name, label, roles, rows, licence, present, file, citation."""
    table = pd.DataFrame(map(vars, SOURCES.values()))
    shares = [", ".join(f"{r} {s:g}" for r, s in roles.items()) for roles in table["roles"]]
    table = table.assign(roles=shares, present=[bool(_found(e)) for e in SOURCES.values()])
    return table[["name", "label", "rows", "licence", "file", "citation", "roles", "present"]]


def verify(names: list[str] | None = None) -> pd.DataFrame:
    """Check and parse every source at hand: name, status (ok, missing or the error), rows."""
    rows = []
    for name in names or list(SOURCES):
        status, n = "missing", 0
        if _found(source(name)):
            try:
                status, n = "ok", len(load(name, download=False))
            except DCRError as error:
                status = str(error)
        rows.append({"name": name, "status": status, "rows": n})
    return pd.DataFrame(rows)


# ---- tables -----------------------------------------------------------------------------------


def load(name: str, *, download: bool = True) -> pd.DataFrame:
    """One source as a prompt table; `request` and `role` are empty (see `dcr.data.ledger`)."""
    path, version = _verified(name, download)
    table = parse(source(name), path)
    if version["rows"] not in (0, len(table)):
        raise DCRError(
            f"{path}: {len(table)} rows for {name}, expected {version['rows']}. Delete it and run: "
            f"dcr data fetch {name}"
        )
    return table


def licence_of(origin: str) -> str:
    """The licence of prompts by their column `source`; "yours" for a table of the user's own."""
    known = {entry.source or entry.name: entry.licence for entry in SOURCES.values()}
    return known.get(origin, "CC-BY-4.0" if origin in ("dcr-pairs", "dcr-general") else "yours")


def load_bundled(name: str) -> pd.DataFrame:
    """The kit's own data: "pairs" (DCR-Pairs) or "general"."""
    path = BUNDLED / f"{name}.jsonl"
    return as_table(read_rows(path), path, origin=f"dcr-{name}")


@cache
def audit() -> dict[str, str]:
    """id → harmful, ambiguous or harmless for the public toxic training file (our own reading)."""
    marks = pd.read_csv(BUNDLED / "audit.csv")
    return dict(zip(marks["id"], marks["label"], strict=True))


def parse(entry: Source, path: Path) -> pd.DataFrame:
    """The prompts in an upstream file. Raises DCRError naming row and missing column."""
    rows = []
    for number, row in enumerate(read_rows(path)):
        if any(row.get(k) != v for k, v in entry.keep.items()):
            continue
        try:
            made = SHAPES[entry.shape](row, entry.columns)
        except KeyError as missing:
            found = ", ".join(row)
            raise DCRError(
                f"{path}: row {number}: column {missing} is missing; found {found}."
            ) from missing
        for one in made:
            key = f"{entry.ids or entry.name}-{one.get('id', number)!s:0>4}"
            key += f"-{one['model']}" if "model" in one else ""
            rows.append({**one, "id": key, "source": entry.source or entry.name})
    return as_table(rows, path, label=entry.label, origin=entry.name)
