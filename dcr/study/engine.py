"""Many tasks through joblib (this machine) or Ray (a cluster); a failure is told, not raised."""

import logging
import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from dcr.errors import DCRError

log = logging.getLogger("dcr")
T = TypeVar("T")


def run_all(
    task: Callable[[T], object], items: Sequence[T], *, engine: str = "joblib", jobs: int = 1
) -> Iterator[tuple[T, str]]:
    """`task` of every item, in any order: (item, "" or why it failed), as they end.

    engine joblib: `jobs` processes of this machine (1: this one). engine ray: a cluster (address
    from RAY_ADDRESS, else one of this machine), one GPU a task where there are any; the run
    directory must be on a disk that all see.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if jobs == 0:
        raise DCRError("jobs=0: give the number of processes, or -1 for one a core.")
    if engine == "ray":
        yield from _through_ray(task, items)
    elif engine != "joblib":
        raise DCRError(f"engine={engine!r} is unknown; use joblib or ray.")
    elif jobs == 1 or len(items) < 2:
        for item in items:
            yield _guarded(task, item)
    else:
        yield from _through_joblib(task, items, jobs)


def _guarded(task: Callable[[T], object], item: T) -> tuple[T, str]:
    try:
        task(item)
    except DCRError as error:
        return item, str(error)
    except Exception as error:  # which recipes cannot be run is a finding
        log.debug(traceback.format_exc())
        return item, f"{type(error).__name__}: {error}"
    return item, ""


def _through_joblib(task: Callable[[T], object], items: Sequence[T], jobs: int):
    from joblib import Parallel, delayed

    left, before = list(items), len(items) + 1
    while left:  # a new pool where one broke; one task a pool once a pool ended none
        before, alone = len(left), len(left) == before
        now = left[:1] if alone else list(left)
        try:
            workers = Parallel(n_jobs=jobs, return_as="generator_unordered")
            for item, error in workers(delayed(_guarded)(task, item) for item in now):
                left.remove(item)
                yield item, error
        except Exception as error:  # joblib's own: a worker died, and the others with it
            log.warning("a worker process died; %d tasks are left", len(left))
            if alone:
                died = f"a worker process died ({type(error).__name__}), perhaps out of memory"
                yield left.pop(0), died


def _through_ray(task: Callable[[T], object], items: Sequence[T]):
    try:
        import ray
    except ImportError as error:
        raise DCRError("engine=ray needs Ray: pip install 'dcr-kit[cluster]'.") from error
    mine = not ray.is_initialized()
    try:
        if mine:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        remote: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_guarded)
        running = {remote.remote(task, item): item for item in items}
        while running:
            (done, *_), _ = ray.wait(list(running))
            item = running.pop(done)
            try:
                yield ray.get(done)
            except ray.exceptions.RayError as error:
                said = re.sub(r"\x1b\[[0-9;]*m", "", str(error))[:300]
                yield item, f"the worker died ({type(error).__name__}): {said}"
    except ConnectionError as error:
        raise DCRError(f"no Ray cluster at {os.environ.get('RAY_ADDRESS')}: {error}") from error
    finally:
        if mine and ray.is_initialized():
            ray.shutdown()
