"""The registry of upstream tables (`sources.yaml`), where their files are found or fetched, and each as a prompt table.

A file comes from `DCR_DATA_DIR`, else the cache, else a download over https that is checked against its checksum.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pandas as pd
import yaml

from dcr.data.files import cache_dir, sha256_of, write_atomic
from dcr.data.read import Row, as_table, read_rows
from dcr.errors import DCRError

log = logging.getLogger("dcr")
BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class Source:
    """One named table (fields as in `sources.yaml`). sha256 is "" where a pinned revision alone verifies it."""

    name: str
    file: str  # <folder>/<file> below the data folder
    licence: str
    citation: str
    url: str = ""
    sha256: str = ""
    rows: int = 0  # 0 where unknown
    label: str = ""  # class of its prompts; "" for completions
    roles: dict[str, float] = field(default_factory=dict)  # role in the ledger → share of requests
    columns: dict[str, str] = field(default_factory=dict)  # ours ← theirs
    keep: dict[str, str] = field(default_factory=dict)  # rows that have these values
    shape: str = ""  # a function of SHAPES for what is no plain table
    source: str = ""  # what the column `source` says, if not the name
    ids: str = ""  # stem of ids, if not the name
    hub: dict[str, str] = field(default_factory=dict)  # repository, revision, file
    part: dict = field(
        default_factory=dict
    )  # file, rows, sha256 of a part that stands for the table
    derived: bool = False  # has no download


def _registry() -> dict[str, Source]:
    entries = {}
    for group in yaml.safe_load(Path(__file__).with_name("sources.yaml").read_text("utf-8")):
        for name, given in group["sources"].items():
            own, folder = dict(given), group["folder"]
            url = f"{group['url']}/{own.pop('path', own['file'])}" if "url" in group else ""
            own["file"] = f"{folder}/{own['file']}"
            if "part" in own:
                own["part"] = own["part"] | {"file": f"{folder}/{own['part']['file']}"}
            about = {k: group[k] for k in ("licence", "citation")}
            entries[name] = Source(name=name, url=url, **about, **own)
    return entries


SOURCES: dict[str, Source] = _registry()


def source(name: str) -> Source:
    """The registry entry. Raises DCRError listing the known names."""
    if name not in SOURCES:
        raise DCRError(
            f"data source {name!r} is unknown; known: {', '.join(SOURCES)}; or give the path of a table."
        )
    return SOURCES[name]


# ---- files -----------------------------------------------------------------------------------------------------


def data_dir() -> Path:
    """`DCR_DATA_DIR`, else the cache's data folder."""
    given = os.environ.get("DCR_DATA_DIR")
    if given and not Path(given).expanduser().is_dir():
        raise DCRError(
            f"DCR_DATA_DIR={given} is no folder. Point it at a folder laid out as <dataset>/<file>, or "
            "unset it to download."
        )
    return Path(given).expanduser().absolute() if given else cache_dir() / "data"


def _versions(entry: Source) -> list[dict]:
    whole = {"file": entry.file, "rows": entry.rows, "sha256": entry.sha256}
    return [whole, entry.part] if entry.part else [whole]


def _found(entry: Source) -> tuple[Path, dict] | None:
    for folder in dict.fromkeys((data_dir(), cache_dir() / "data")):
        for version in _versions(entry):
            if (path := folder / version["file"]).is_file():
                return path, version
    return None


def _verified(name: str, download: bool) -> tuple[Path, dict]:
    entry = source(name)
    found = _found(entry)
    if not found and not download:
        raise DCRError(
            f"{name}: {entry.file} is neither in {data_dir()} nor in the cache. Run: dcr data fetch {name}"
        )
    path, version = found or (_download(entry, cache_dir() / "data"), _versions(entry)[0])
    stat = path.stat()
    if version["sha256"] and _sum(path, stat.st_mtime_ns, stat.st_size) != version["sha256"]:
        raise DCRError(
            f"{path}: sha256 differs from the registry's for {name} (truncated, edited or another "
            f"version). Delete it and run: dcr data fetch {name}"
        )
    return path, version


@cache
def _sum(path: Path, changed: int, size: int) -> str:
    return sha256_of(path)


def path_of(name: str, *, download: bool = True) -> Path:
    """The verified file of a source. Raises DCRError when it is missing and cannot be fetched, or differs."""
    return _verified(name, download)[0]


def _download(entry: Source, folder: Path) -> Path:
    """Fetch one source's file, whole or not at all. Raises DCRError when it cannot be had."""
    target = folder / entry.file
    if entry.derived:
        raise DCRError(
            f"{entry.name}: {entry.file} is a derived file and has no download. Give DCR_DATA_DIR."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    place = "{repository} at {revision}".format(**entry.hub) if entry.hub else entry.url
    try:
        if entry.hub:
            from huggingface_hub import hf_hub_download

            repository, revision, file = (entry.hub[k] for k in ("repository", "revision", "file"))
            found = Path(hf_hub_download(repository, file, revision=revision, repo_type="dataset"))
            temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
            shutil.copyfile(found, temporary)
            write_atomic(Path(f"{target}.revision"), f"{repository}@{_commit(found) or revision}")
            os.replace(temporary, target)
        else:
            retrieve(entry.url, target, entry.sha256)
    except Exception as error:  # whatever the hub client, pooch and requests raise
        raise DCRError(
            f"{entry.name}: {place} could not be fetched ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:160]}). Check the network and, for gated sets, HF_TOKEN; or "
            f"place the file at {target}."
        ) from error
    return target


def _commit(path: Path) -> str:
    """The commit in a path of the hub's cache (.../snapshots/<commit>/...)."""
    match = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", str(path))
    return match[1] if match else ""


def retrieve(url: str, target: Path, sha256: str, retries: int = 3) -> None:
    """Download to `target` with progress and retries; it appears only when whole and its checksum is right."""
    import pooch

    name = target.name
    store = pooch.create(
        target.parent,
        "",
        registry={name: f"sha256:{sha256}"},
        urls={name: url},
        retry_if_failed=retries,
    )
    store.fetch(name, downloader=pooch.HTTPDownloader(progressbar=True, timeout=30))


def fetch(names: list[str]) -> list[Path]:
    """Make sure that the named sources are at hand; returns their files."""
    return [path_of(name) for name in names]


def provenance(names: Iterable[str]) -> list[dict]:
    """What was read for each source, for manifests: name, file, sha256, and the hub's revision or "part"."""
    rows = []
    for name in names:
        path, version = _verified(name, download=True)
        entry, receipt = SOURCES[name], Path(f"{path}.revision")
        read = "part" if version is entry.part else receipt.read_text() if receipt.is_file() else ""
        stat = path.stat()
        checksum = version["sha256"] or _sum(path, stat.st_mtime_ns, stat.st_size)
        rows.append({"name": name, "file": version["file"], "sha256": checksum, "read": read})
    return rows


def list_sources() -> pd.DataFrame:
    """Every source: name, label, roles, rows, licence, present, file, citation."""
    return pd.DataFrame(
        {
            "name": e.name,
            "label": e.label,
            "roles": ", ".join(f"{role} {share:g}" for role, share in e.roles.items()),
            "rows": e.rows,
            "licence": e.licence,
            "present": _found(e) is not None,
            "file": e.file,
            "citation": e.citation,
        }
        for e in SOURCES.values()
    )


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


# ---- tables ----------------------------------------------------------------------------------------------------


def load(name: str, *, download: bool = True) -> pd.DataFrame:
    """One registry source as a prompt table; `request` and `role` are empty (see `dcr.data.ledger`)."""
    path, version = _verified(name, download)
    table = parse(source(name), path)
    if version["rows"] and len(table) != version["rows"]:
        raise DCRError(
            f"{path}: {len(table)} rows for {name}, expected {version['rows']}. The file is truncated or another "
            f"version; delete it and run: dcr data fetch {name}"
        )
    return table


def load_bundled(name: str) -> pd.DataFrame:
    """The kit's own data: "pairs" (DCR-Pairs) or "general"."""
    if name not in ("pairs", "general"):
        raise DCRError(f"bundled data {name!r} is unknown; use pairs or general.")
    path = BUNDLED / f"{name}.jsonl"
    return as_table(read_rows(path), path, origin=f"dcr-{name}")


@cache
def audit() -> dict[str, str]:
    """id → harmful, ambiguous or harmless for the public toxic training file (our own reading, no text)."""
    marks = pd.read_csv(BUNDLED / "audit.csv")
    return dict(marks[["id", "label"]].itertuples(index=False, name=None))


def parse(entry: Source, path: Path) -> pd.DataFrame:
    """The prompt table in an upstream file. Raises DCRError naming file, row and the column that is missing."""
    rows = []
    for number, row in enumerate(read_rows(path)):
        if any(row.get(k) != v for k, v in entry.keep.items()):
            continue
        try:
            made = SHAPES[entry.shape](row, entry)
        except KeyError as missing:
            raise DCRError(
                f"{path}: row {number}: column {missing} is missing; found {', '.join(row)}."
            ) from missing
        for one in made:
            key = f"{entry.ids or entry.name}-{one.get('id', number)!s:0>4}"
            key += f"-{one['model']}" if "model" in one else ""
            rows.append({**one, "id": key, "source": entry.source or entry.name})
    return as_table(rows, path, label=entry.label, origin=entry.name)


def _plain(row: Row, entry: Source) -> list[Row]:
    columns = {"text": "text"} | entry.columns
    # A part or a copy may lack the category.
    return [{o: row.get(t, "") if o == "category" else row[t] for o, t in columns.items()}]


def _alpaca(row: Row, entry: Source) -> list[Row]:
    parts = [str(row["instruction"]), str(row.get("input") or "").strip()]
    return [{"text": "\n\n".join(filter(None, parts)), "response": row["output"]}]


def _red_team(row: Row, entry: Source) -> list[Row]:
    first = str(row["transcript"]).split("Assistant:")[0].replace("Human:", "").strip()
    tags = row.get("tags")
    return [{"text": first, "category": str(tags[0]) if tags else ""}] if first else []


def _multiple_choice(row: Row, entry: Source) -> list[Row]:
    choices = row["choices"]
    answer = choices["text"][choices["label"].index(row["answerKey"])]
    return [{"text": row["question"], "response": answer, "category": entry.name}]


def _completions(row: Row, entry: Source) -> list[Row]:
    kind = str(row["type"])
    label = "toxic" if kind.startswith("contrast") else "seemingly_toxic"
    marks = ("completion", "annotation_1", "annotation_2", "agreement", "final_label")
    return [{"text": row["prompt"], "category": kind, "label": label} | {k: row[k] for k in marks}]


def _user_study(row: Row, entry: Source) -> list[Row]:
    """One row a model: model, completion, answers = share of people who say that the reply answers."""
    models = [c.removesuffix(" answer rate") for c in row if c.endswith(" answer rate")]
    about = {"text": row["input"], "category": row["classification"]}
    return [
        about
        | {"model": m, "completion": row[m]}
        | {"answers": float(str(row[f"{m} answer rate"]))}
        for m in models
    ]


SHAPES: dict[str, Callable[[Row, Source], list[Row]]] = {
    "": _plain,
    "alpaca": _alpaca,
    "red_team": _red_team,
    "multiple_choice": _multiple_choice,
    "completions": _completions,
    "user_study": _user_study,
}
