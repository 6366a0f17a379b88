"""The run directory: one folder an artifact, keyed by everything that it depends on.

`<run>/<kind>/<name>-<key>/` with a `manifest.json` written last. Work happens in `….partial`, which
survives a kill so that long stages resume in it; a finished artifact appears by rename, whole or
not at all, and its checksums are read again before it is used. A lock an artifact lets many
processes share one folder; the system releases it when its holder dies.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dcr.data.files import content_key, measured_peak, sha256_of, write_atomic, writing
from dcr.errors import DCRError

log = logging.getLogger("dcr")
PACKAGES = (
    "dcr-kit torch transformers peft accelerate datasets numpy pytorch-metric-learning "
    "scikit-learn pandas lm-eval"
).split()


@functools.cache
def environment() -> dict:
    """Versions, platform, threads and git commit, for manifests."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    torch = sys.modules.get("torch")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "packages": versions,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parents[1]), *arguments]
        options: Any = {"text": True, "timeout": 10, "stderr": subprocess.DEVNULL}
        return subprocess.check_output(command, **options).strip()

    try:
        git("ls-files", "--error-unmatch", ".")  # an installed copy may lie in another repository
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def is_main() -> bool:
    """Whether this process keeps what several of one `accelerate launch` make together."""
    return int(os.environ.get("RANK", 0)) == 0


def _wait_for_all() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its folder and its manifest."""

    path: Path

    @property
    def manifest(self) -> dict:
        """The manifest written when it was finished. Raises DCRError where it cannot be read."""
        path = self.path / "manifest.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise DCRError(
                f"{path} cannot be read ({error}). Delete its folder; what needs it is made again."
            ) from error

    def broken(self) -> str:
        """What is wrong with its files: missing, or changed since they were finished; else ""."""
        try:
            manifest = self.manifest
            outputs = manifest["outputs"].items()
            if manifest.pop("checksum") != digest(manifest):
                return "manifest.json has changed since it was written"
        except (DCRError, KeyError, AttributeError):
            return "manifest.json cannot be read"
        for name, checksum in outputs:
            path = self.path / name
            if not path.is_file():
                return f"{name} is missing"
            if sha256_of(path) != checksum:
                return f"{name} has changed since it was written"
        return ""


def digest(manifest: Mapping) -> str:
    """The checksum of a manifest without its own."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """Artifacts of one run directory.

    complete: refuse to compute what is not there, as `dcr verify` does.
    """

    def __init__(self, root: str | Path, *, complete: bool = False) -> None:
        self.root, self.complete = Path(root).expanduser().absolute(), complete
        self.computed: list[str] = []
        self.reused: list[str] = []
        self.asked: set[str] = set()  # cleared by who wants to know what a call needs
        self._sound: set[Path] = set()

    def get(
        self, kind: str, name: str, dependencies: Mapping, build: Callable[[Path], Mapping | None]
    ) -> Artifact:
        """The artifact, built by `build(work_folder)` unless it is there, whole and unchanged.

        `build` may find files of an earlier, killed attempt in its folder and go on from them; what
        it returns is added to the manifest. Raises DCRError where the folder cannot be written.
        """
        path = self.root / kind / f"{name}-{content_key(dependencies)}"
        work = path.with_name(path.name + ".partial")
        if self._usable(path):
            return self._noted(self.reused, kind, path, "reused")
        if self.complete:
            raise DCRError(f"{kind}/{path.name} is not in {self.root}.")
        if not is_main():  # a further process of one training builds along and keeps nothing
            work.mkdir(parents=True, exist_ok=True)
            build(work)
            _wait_for_all()
            return Artifact(path)
        with writing(path), self.lock(path):
            if self._usable(path):
                return self._noted(self.reused, kind, path, "reused (another process finished it)")
            work.mkdir(exist_ok=True)
            started, clock = time.gmtime(), time.monotonic()
            try:
                with measured_peak() as peak:
                    extra = build(work) or {}
            except BaseException:
                with contextlib.suppress(OSError):  # where it holds work, that stays
                    work.rmdir()
                raise
            files = {p.relative_to(work).as_posix(): p for p in work.rglob("*") if p.is_file()}
            files.pop("manifest.json", None)
            manifest = {
                "kind": kind,
                "name": name,
                "dependencies": dependencies,
                "environment": environment(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", started),
                "seconds": round(time.monotonic() - clock, 2),
                **peak.mib(),
                **extra,
                "outputs": {name: sha256_of(files[name]) for name in sorted(files)},
            }
            manifest["checksum"] = digest(json.loads(json.dumps(manifest)))
            write_atomic(work / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False))
            if path.exists():  # what had changed since it was finished
                shutil.rmtree(path)
            os.replace(work, path)
            self._sound.add(path)
        _wait_for_all()
        return self._noted(self.computed, kind, path, f"computed in {manifest['seconds']} s")

    def _usable(self, path: Path) -> bool:
        """Whether it is finished and its files are what they were (read once a session)."""
        if path in self._sound and path.is_dir():
            return True
        if not (path / "manifest.json").is_file():
            return False
        if reason := Artifact(path).broken():
            log.warning("%s/%s: %s; it is computed again", path.parent.name, path.name, reason)
            return False
        self._sound.add(path)
        return True

    def _noted(self, where: list[str], kind: str, path: Path, text: str) -> Artifact:
        self.asked.add(name := f"{kind}/{path.name}")
        if name not in (*self.computed, *self.reused):
            where.append(name)
            log.info("%s: %s", name, text)
        return Artifact(path)

    @contextlib.contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """Hold `path` alone among processes; the lock file goes away, unless one is killed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_name(path.name + ".lock")
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("%s is being computed by another process; waiting for it", path.name)
            lock.acquire()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)  # who waits sees it, and takes a new one
            lock.release()

    def artifacts(self) -> list[Artifact]:
        """Every finished artifact of the run directory; one killed at its rename is none."""
        found = (p.parent for p in sorted(self.root.glob("*/*-*/manifest.json")))
        return [Artifact(p) for p in found if p.suffix != ".partial"]
