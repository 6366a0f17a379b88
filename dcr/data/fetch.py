"""Upstream files: from `DCR_DATA_DIR`, else the cache, else a download with progress, retries and a checksum."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from dcr.data.files import cache_dir, sha256_of
from dcr.data.registry import HUB_FILES, SOURCES, Source, source
from dcr.errors import DCRError

log = logging.getLogger("dcr")
RETRIES = 3


def data_dir() -> Path:
    """`DCR_DATA_DIR`, else the cache's data folder."""
    given = os.environ.get("DCR_DATA_DIR")
    if given and not Path(given).expanduser().is_dir():
        raise DCRError(
            f"DCR_DATA_DIR={given} is no folder. Point it at a folder laid out as <dataset>/<file>, or "
            "unset it to download."
        )
    return Path(given).expanduser().absolute() if given else cache_dir() / "data"


def path_of(name: str, *, download: bool = True) -> Path:
    """The verified file of a source. Raises DCRError when it is missing and cannot be fetched, or differs."""
    entry = source(name)
    for folder in dict.fromkeys((data_dir(), cache_dir() / "data")):
        path = folder / entry.file
        if path.is_file():
            check(entry, path)
            return path
    if not download:
        raise DCRError(
            f"{name}: {entry.file} is neither in {data_dir()} nor in the cache. Run: dcr data fetch {name}"
        )
    return download_source(name, cache_dir() / "data" / entry.file)


_checked: set[tuple[str, float]] = set()


def check(entry: Source, path: Path) -> None:
    """Compare a file's sha256 with the registry's. Raises DCRError naming file and mend."""
    mark = (str(path), path.stat().st_mtime)
    if entry.sha256 and mark not in _checked and sha256_of(path) != entry.sha256:
        raise DCRError(
            f"{path}: sha256 differs from the registry's for {entry.name} (truncated, edited or another "
            f"version). Delete it and run: dcr data fetch {entry.name}"
        )
    _checked.add(mark)


def download_source(name: str, target: Path) -> Path:
    """Fetch one source into `target`, atomically. Raises DCRError when it cannot be had."""
    entry = source(name)
    if entry.url.startswith("derived"):
        raise DCRError(
            f"{name}: {entry.file} is a derived file and has no download. Give DCR_DATA_DIR; online, "
            "lm-eval fetches the task itself."
        )
    if name in HUB_FILES:
        return _from_hub(name, target)
    download(entry.url, target, entry.sha256)
    return target


def download(
    url: str, target: Path, sha256: str = "", retries: int = RETRIES, wait: float = 1.0
) -> None:
    """Stream `url` to `target` by way of a temporary file; retried; renamed only when whole and right."""
    import requests

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + f".{os.getpid()}.part")
    problem = ""
    for attempt in range(retries):
        if attempt:
            time.sleep(wait * 2**attempt)
        try:
            with requests.get(url, stream=True, timeout=30) as answer:
                answer.raise_for_status()
                size = int(answer.headers.get("content-length") or 0)
                with (
                    open(temporary, "wb") as sink,
                    tqdm(
                        total=size or None, unit="B", unit_scale=True, leave=False, desc=target.name
                    ) as bar,
                ):
                    for piece in answer.iter_content(1 << 16):
                        sink.write(piece)
                        bar.update(len(piece))
            if sha256 and sha256_of(temporary) != sha256:
                problem = "its sha256 differs from the registry's"
                continue
            os.replace(temporary, target)
            return
        except (requests.RequestException, OSError) as error:
            problem = str(error).splitlines()[0][:200]
            log.warning(
                "%s: attempt %d of %d failed: %s", target.name, attempt + 1, retries, problem
            )
        finally:
            temporary.unlink(missing_ok=True)
    raise DCRError(
        f"{url}: could not be downloaded after {retries} attempts ({problem}). Check the network, or place "
        f"the file at {target}, or set DCR_DATA_DIR."
    )


def _from_hub(name: str, target: Path) -> Path:
    """One file of a hub data set at its pinned revision (a table written as JSONL where no file name is known)."""
    repository, revision, file = HUB_FILES[name]
    try:
        if file:
            from huggingface_hub import hf_hub_download

            found = Path(hf_hub_download(repository, file, revision=revision, repo_type="dataset"))
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(target.name + ".part")
            temporary.write_bytes(found.read_bytes())
            os.replace(temporary, target)
        else:
            import datasets

            table = datasets.load_dataset(repository, revision=revision, split="train").to_pandas()
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(target.name + ".part")
            table.to_json(temporary, orient="records", lines=True, force_ascii=False)
            os.replace(temporary, target)
    except Exception as error:  # whatever the hub client raises
        raise DCRError(
            f"{name}: {repository} at {revision} could not be fetched "
            f"({type(error).__name__}: {str(error).splitlines()[0][:160]}). Check the network and, for "
            f"gated sets, HF_TOKEN; or place the file at {target}."
        ) from error
    return target


def list_sources() -> pd.DataFrame:
    """Every source with its role, rows, licence, and whether its file is at hand."""
    rows = []
    for entry in SOURCES.values():
        here = any((folder / entry.file).is_file() for folder in (data_dir(), cache_dir() / "data"))
        rows.append(
            {
                "name": entry.name,
                "role": entry.role,
                "label": entry.label,
                "rows": entry.rows,
                "licence": entry.licence,
                "present": here,
                "file": entry.file,
                "citation": entry.citation,
            }
        )
    return pd.DataFrame(rows)


def fetch(names: list[str]) -> list[Path]:
    """Make sure that the named sources are at hand; returns their files."""
    return [path_of(name) for name in names]


def verify(names: list[str] | None = None) -> pd.DataFrame:
    """Check and parse every source at hand: name, status (ok, missing or the error), rows."""
    from dcr.data import loaders

    rows = []
    for name in names or list(SOURCES):
        try:
            path_of(name, download=False)
            rows.append(
                {"name": name, "status": "ok", "rows": len(loaders.load(name, download=False))}
            )
        except DCRError as error:
            missing = "neither in" in str(error)
            rows.append({"name": name, "status": "missing" if missing else str(error), "rows": 0})
    return pd.DataFrame(rows)
