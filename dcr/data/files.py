"""Files: atomic writes, JSON lines, checksums, the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

from platformdirs import user_cache_dir

from dcr.errors import DCRError


def content_key(dependencies: object) -> str:
    """12 hex digits of a canonical JSON of the dependencies. Raises DCRError on something JSON cannot hold."""
    try:
        text = json.dumps(dependencies, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DCRError(f"artifact dependencies must be plain values: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write to a temporary file beside `path`, fsync, rename: readers see the old content or the new, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DCRError(
            f"{path}: could not be written ({error.strerror}). Free space or choose another run directory; "
            "what was there before is unchanged."
        ) from error


def append_jsonl(path: Path, row: Mapping) -> None:
    """Append one JSON line and flush it to the system, so that a kill loses at most the line being written."""
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(row, ensure_ascii=False) + "\n")
        handle.flush()


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSONL file; an unfinished last line (killed while writing) is left out."""
    rows = []
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DCRError(
                f"{path}: line {number} is not JSON ({error.msg}). Delete that line or the file."
            ) from error
    return rows


def peak_memory_mib() -> float:
    """Largest resident size of this process so far, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 * 1024 if sys.platform == "darwin" else 1024), 1)


def cache_dir() -> Path:
    """The kit's cache: `DCR_CACHE_DIR`, else the platform's user cache."""
    return (
        Path(os.environ.get("DCR_CACHE_DIR") or user_cache_dir("dcr-kit")).expanduser().absolute()
    )


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
