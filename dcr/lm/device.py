"""The device: which one, how precise, how many rows fit at once, what a kill leaves of them."""

import contextlib
import gc
import io
import itertools
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from dcr.data.files import content_key, write_atomic
from dcr.errors import DCRError

log = logging.getLogger("dcr")
Result = TypeVar("Result")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_KEPT: ContextVar[tuple[Path, Iterator[int]] | None] = ContextVar("kept", default=None)


def pick_device(device: str) -> str:
    """The device that a wish comes to; one that this machine lacks becomes the CPU, with a warning.

    "auto": the process's GPU, then mps, then cpu. Raises DCRError for an unknown name.
    """
    gpus = torch.cuda.device_count()
    if device == "auto":
        if gpus:  # one a process
            return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % gpus}"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = str(device).partition(":")
    if kind not in ("cpu", "cuda", "mps") or not (number or "0").isdigit():
        raise DCRError(f"model.device={device!r} is unknown; use auto, cpu, cuda, cuda:1 or mps.")
    there = {"cuda": int(number or 0) < gpus, "mps": torch.backends.mps.is_available()}
    if there.get(kind, True):
        return device
    log.warning("model.device=%s: this machine has none, so the CPU does the work", device)
    return "cpu"


def resolve_precision(wanted: str, device: str | torch.device) -> str:
    """ "bf16" or "fp32"; "auto": the first where hardware multiplies it, else 2 to 24 times slower.

    Raises DCRError for another wish.
    """
    if wanted not in ("auto", *DTYPES):
        raise DCRError(f"model.precision={wanted!r} is unknown; use auto, {' or '.join(DTYPES)}.")
    if wanted != "auto":
        return wanted
    return "bf16" if _multiplies_bf16(torch.device(device)) else "fp32"


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()  # what oneDNN may use
        allowed = any(word in limit for word in ("ALL", "DEFAULT", "BF16", "FP16", "AMX", "AVX10"))
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return allowed and native
    try:  # Apple: from macOS 14 on, and not on every chip
        one = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
        return bool(((one @ one).float() == 8).all())
    except (RuntimeError, TypeError):
        return False


def autocast(device: str | torch.device, precision: str) -> torch.autocast:
    """The context in which fp32 weights train: bf16 products if `precision` (resolved) says so."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


def out_of_memory(error: Exception) -> bool:
    """Whether a device had no room, also where cuDNN or cuBLAS say so as an internal error."""
    from accelerate.utils.memory import should_reduce_batch_size

    hints = ("mha_graph.execute", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or should_reduce_batch_size(error)
        or any(hint in str(error) for hint in hints)
    )


def tokens_that_fit(model, *, training: bool = False, checkpointing: bool = False) -> int:
    """Tokens of a batch whose activations take a third of what the device holds beside the weights.

    By the device's size and not by what is free at the moment, so that two runs cut alike. In
    training a block keeps about 20 hidden and 6 feed-forward values a token (4 bytes each; after
    Korthikanti et al. 2022, section 4), with `checkpointing` its input and one block's at a time;
    without gradients one block's and the keys and values.
    """
    config = model.config.get_text_config()
    hidden, blocks = config.hidden_size, config.num_hidden_layers
    block = 20 * hidden + 6 * (getattr(config, "intermediate_size", None) or 4 * hidden)
    values = blocks * block if training and not checkpointing else block + 2 * blocks * hidden
    size, weights = sizes(model)
    return max(256, int((size - weights) / 3 / (4 * values)))


def sizes(model) -> tuple[int, int]:
    """(memory of the model's device, of its weights), bytes."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "mps":
        size = torch.mps.recommended_max_memory()
    else:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return size, sum(p.numel() * p.element_size() for p in model.parameters())


def in_memory(
    batches: Sequence[list[int]], run: Callable[[list[int]], Result]
) -> Iterator[tuple[list[int], Result]]:
    """(batch, run(batch)) of each; where memory runs out, that batch and all later ones in halves.

    That happens once, with a warning. Raises DCRError when half a batch does not fit either.
    """
    run = _kept(run)
    waiting, halved = deque(batches), False
    while waiting:
        batch = waiting.popleft()
        try:
            yield batch, run(batch)
            continue
        except Exception as error:
            if not out_of_memory(error):
                raise
            full = error.with_traceback(None)  # lets go of what the failed pass held
        if halved or len(batch) == 1:
            raise DCRError(
                f"memory does not suffice for {len(batch)} rows at once ({str(full)[:120]}). Lower "
                "the batch size or max_tokens_per_batch, or free the device of other programs."
            ) from full
        halved = True
        log.warning("memory ran out at %d rows: going on with batches of half the size", len(batch))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        halves = [(b[: (len(b) + 1) // 2], b[(len(b) + 1) // 2 :]) for b in (batch, *waiting)]
        waiting = deque(half for pair in halves for half in pair if half)


@contextlib.contextmanager
def keeping(folder: Path) -> Iterator[None]:
    """Within it each batch's array is kept below `folder`, for the same call after a kill.

    That call must run the same passes in the same order. What was kept goes away at the end.
    """
    kept = Path(folder) / "batches"
    token = _KEPT.set((kept, itertools.count()))
    try:
        yield
    finally:
        _KEPT.reset(token)
    shutil.rmtree(kept, ignore_errors=True)


def _kept(run: Callable[[list[int]], Any]) -> Callable[[list[int]], Any]:
    """`run`, but a batch that was kept is read; arrays in place of tensors."""
    if not (place := _KEPT.get()):
        return run
    folder, number = place[0], next(place[1])

    def read(batch: list[int]) -> np.ndarray:
        path = folder / f"{number}-{content_key(batch)}.npy"
        if path.exists():
            return np.load(path, allow_pickle=False)
        values, content = np.asarray(torch.as_tensor(run(batch)).cpu()), io.BytesIO()
        np.save(content, values, allow_pickle=False)
        write_atomic(path, content.getvalue())
        return values

    return read
