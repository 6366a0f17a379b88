"""The run directory: one folder per artifact, keyed by what it depends on.

`<run>/<kind>/<name>-<key>/` with a `manifest.json` written last. Work happens in `….partial`, which survives a
kill so that long stages resume in it; a finished artifact appears by rename, whole or not at all. A lock per
artifact lets many workers share one folder.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout

from dcr.data.files import content_key, peak_memory_mib, sha256_of, write_atomic

log = logging.getLogger("dcr")

PACKAGES = (
    "dcr-kit",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "pytorch-metric-learning",
    "scikit-learn",
    "numpy",
    "pandas",
    "lm-eval",
)


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
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
        dirty = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "dcr"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (
        done.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
        if done.returncode == 0
        else "unknown"
    )


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its folder and its manifest."""

    path: Path

    @property
    def manifest(self) -> dict:
        """The manifest written when it was finished."""
        return json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))


class Store:
    """Artifacts of one run directory."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self.computed: list[str] = []
        self.reused: list[str] = []

    def path(self, kind: str, name: str, dependencies: object) -> Path:
        """Where the artifact stands, finished or not."""
        return self.root / kind / f"{name}-{content_key(dependencies)}"

    def get(
        self, kind: str, name: str, dependencies: Mapping, build: Callable[[Path], Mapping | None]
    ) -> Artifact:
        """The artifact, built by `build(work_folder)` unless it is there already.

        `build` may find files of an earlier, killed attempt in its folder and go on from them. What it returns is
        added to the manifest.
        """
        path = self.path(kind, name, dependencies)
        if (path / "manifest.json").is_file():
            self._note(self.reused, kind, path, "reused")
            return Artifact(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.lock(path):
            if (path / "manifest.json").is_file():
                self._note(self.reused, kind, path, "reused (another worker finished it)")
                return Artifact(path)
            work = path.with_name(path.name + ".partial")
            work.mkdir(exist_ok=True)
            started = time.time()
            extra = build(work) or {}
            manifest = {
                "kind": kind,
                "name": name,
                "dependencies": dependencies,
                "environment": environment(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
                "seconds": round(time.time() - started, 2),
                "peak_memory_mib": peak_memory_mib(),
                **extra,
                "outputs": {
                    str(p.relative_to(work)): sha256_of(p)
                    for p in sorted(work.rglob("*"))
                    if p.is_file() and p.name != "manifest.json"
                },
            }
            write_atomic(work / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False))
            os.replace(work, path)
            self._note(self.computed, kind, path, f"computed in {manifest['seconds']} s")
        return Artifact(path)

    def _note(self, where: list[str], kind: str, path: Path, text: str) -> None:
        where.append(f"{kind}/{path.name}")
        log.info("%s/%s: %s", kind, path.name, text)

    @contextlib.contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        lock_path = path.with_name(path.name + ".lock")
        holder = path.with_name(path.name + ".holder")
        lock = FileLock(str(lock_path))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            who = holder.read_text() if holder.exists() else "another process"
            log.warning("%s is being computed by %s; waiting for it", path.name, who)
            lock.acquire()
        try:
            write_atomic(holder, f"process {os.getpid()} on {socket.gethostname()}")
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def summary(self) -> str:
        """How much this session computed and how much it found ready."""
        return f"{len(self.computed)} artifacts computed, {len(self.reused)} reused"
