"""Files: atomic writes, JSON lines, checksums, the cache folder."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import platform
import resource
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from dcr.errors import DCRError

UNWRITABLE = {
    getattr(errno, f"E{name}")
    for name in "NOSPC DQUOT FBIG ROFS ACCES PERM NOTDIR ISDIR EXIST NOENT".split()
}


def content_key(dependencies: object) -> str:
    """12 hex digits of a canonical JSON of the dependencies. Raises DCRError on what is no JSON."""
    try:
        text = json.dumps(dependencies, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DCRError(f"artifact dependencies must be plain values: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk or a read-only folder is one clear error, whichever library met it."""
    try:
        yield
    except DCRError:
        raise
    except Exception as error:
        if not (reason := _unwritable(error, path)):
            raise
        raise DCRError(
            f"{path}: could not be written ({reason}). Free space or choose another folder; "
            "what was there before is unchanged and the same call then goes on."
        ) from error


def _unwritable(error: BaseException | None, path: Path) -> str:
    """Why nothing could be written there, if `error` or one behind it says that; else ""."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            about = Path(str(error.filename or path))
            reason = os.strerror(error.errno or 0)
            if about == path or path.parent in about.parents or about in path.parents:
                return reason
        if "No space left" in str(error):  # what safetensors and torch say of it
            return "No space left on device"
        error = error.__cause__ or error.__context__
    return ""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside `path`, fsync, rename: readers see the old content or the new, never half.

    A file that holds the content already is left as it is, so that it may be read-only. What a
    killed process of this machine has left of the same file goes away.
    """
    path, content = Path(path), content.encode() if isinstance(content, str) else content
    begins = f".{path.name}.{platform.node()}-"
    with contextlib.suppress(OSError):
        for left in path.parent.glob(f"{glob.escape(begins)}*.tmp"):
            process = left.stem.removeprefix(begins)  # no number: of a machine named like this one
            if process.isdecimal() and not _lives(int(process)):
                left.unlink(missing_ok=True)
        if path.stat().st_size == len(content) and path.read_bytes() == content:
            return
    temporary = path.with_name(f"{begins}{os.getpid()}.tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def append_jsonl(path: Path, row: Mapping) -> None:
    """Append one JSON line and flush it: a kill loses at most the line that is being written.

    An unfinished line that a kill has left is taken away first.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as handle:
            handle.seek(max(0, handle.tell() - 1))
            if handle.read(1) not in (b"", b"\n"):
                write_atomic(path, b"".join(map(_line, read_jsonl(path))))
                return append_jsonl(path, row)
            handle.write(_line(row))


def _line(row: Mapping) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSONL file, split at "\\n" alone; an unfinished last line is left out.

    Raises DCRError naming a line that is no JSON, and for what is no file.
    """
    rows: list[dict] = []
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise DCRError(f"{path}: cannot be read ({error.strerror}). Give a file's path.") from error
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line else []
        except ValueError as error:  # no JSON, or no UTF-8
            if number < len(lines):
                raise DCRError(
                    f"{path}: line {number} is not JSON ({error}). Delete that line or the file."
                ) from error
    return rows


class Peak:
    """Largest memory since its `measured_peak` began: of the process, and of its GPU where used."""

    def __init__(self) -> None:
        torch: Any = sys.modules.get("torch")  # where nobody imported it, no GPU is in use
        self.cuda = torch.cuda if torch and torch.cuda.is_available() else None
        self.largest = self.largest_gpu = 0.0
        if self.cuda:
            self.cuda.reset_peak_memory_stats()

    def sample(self) -> None:
        """Take the process's resident size into account."""
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            now = pages * resource.getpagesize() / 2**20
        except OSError:  # not Linux: the process's high-water mark is all there is
            unit = 2**20 if sys.platform == "darwin" else 2**10
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        self.largest = max(self.largest, now)

    def mib(self) -> dict[str, float]:
        """{"peak_memory_mib": ..., and where there is a GPU "peak_gpu_mib": ...}."""
        self.sample()
        row = {"peak_memory_mib": round(self.largest, 1)}
        if self.cuda:
            self.largest_gpu = max(self.largest_gpu, self.cuda.max_memory_allocated() / 2**20)
            row["peak_gpu_mib"] = round(self.largest_gpu, 1)
        return row


_measured: list[Peak] = []  # those that are running, one within the other


@contextlib.contextmanager
def measured_peak() -> Iterator[Peak]:
    """A `Peak` of what runs inside: sampled 20 times a second, the GPU's counter set to zero.

    The system's own high-water mark only ever rises, so a small stage behind a big one would
    inherit the big one's.
    """
    for outer in _measured:
        outer.mib()  # keeps what the counter says before it starts anew
    peak, done = Peak(), threading.Event()
    _measured.append(peak)

    def watch() -> None:
        while not done.wait(0.05):
            peak.sample()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        _measured.remove(peak)


def cache_dir() -> Path:
    """The kit's cache: `DCR_CACHE_DIR`, else the platform's user cache."""
    folder = os.environ.get("DCR_CACHE_DIR") or user_cache_dir("dcr-kit")
    return Path(folder).expanduser().absolute()


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
