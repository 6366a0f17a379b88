"""Configuration: frozen dataclasses, profiles in YAML, strict overrides.

Nothing is coerced and nothing is guessed: an unknown name or a wrong type raises with the known ones listed.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from dcr.errors import DCRError

PROFILE_DIR = Path(__file__).parent / "profiles"


@dataclass(frozen=True)
class ModelConfig:
    """Which causal LM, and how it is loaded."""

    name: str = "embedded"  # "embedded", a local folder or a hub id
    revision: str = ""  # commit on the hub; "" for local models
    dtype: str = "float32"
    device: str = "auto"
    chat_template: str = "auto"  # or "alpaca"
    layers_path: str = ""  # dotted path of the block list, if the resolver does not find it


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from: "bundled", a registry name, the path of a CSV or JSONL table, or several joined by "+"."""

    seemingly_toxic: str = "bundled"  # stage 1, harmless side
    toxic: str = "bundled"  # stage 1, toxic side
    align_toxic: str = "bundled"  # stage 2, toxic prompts with safe answers
    general: str = "bundled"  # stage 2, ordinary instructions with answers
    benchmarks: tuple[str, ...] = (
        "pairs-safe",
        "pairs-toxic",
        "style-safe",
        "style-toxic",
        "general-test",
    )
    n_seemingly_toxic: int = 250  # paper: XSTest safe; 0 takes all there are
    n_toxic: int = 500  # paper: HH-RLHF
    form_mix: float = (
        0.0  # share of stage 1's published prompts put into the other form (question or imperative)
    )
    audited: bool = (
        False  # drop toxic training prompts that the committed audit marks harmless or ambiguous
    )
    limit: int = 0  # prompts a benchmark, stratified; 0 takes all
    curve_limit: int = 400  # prompts (all benchmarks together) judged at each alignment checkpoint


@dataclass(frozen=True)
class RefineConfig:
    """Stage 1, contrastive refinement (paper section "Method"; unknown values are ours, see the comments)."""

    layer: float | int | str = (
        0.75  # ℓ: fraction of depth, number of blocks, or "auto"; the paper says "middle"
    )
    loss: str = "circle"  # circle, supcon, infonce, triplet
    margin: float = (
        0.4  # m of Circle loss (pytorch-metric-learning's default; unknown in the paper)
    )
    gamma: float = 80.0  # γ of Circle loss; temperature⁻¹ for supcon and infonce
    pooling: str = "last"  # or mean
    pairing: str = "sources"  # sources (paper), matched (minimal pairs), sham (labels shuffled)
    balance_forms: bool = False  # draw questions and imperatives equally in both classes
    toxic_share: float = 0.5  # share of toxic prompts in a batch
    general_share: float = 0.0  # share of general prompts in the non-toxic class
    retention: float = 0.0  # weight of holding general prompts' hidden states to the frozen base's
    batch_size: int = 32
    accumulation: int = 1
    epochs: float = 2.0  # passes over the larger class
    max_steps: int = 0  # 0: from epochs
    lr: float = 2e-4
    warmup: float = 0.1  # share of steps
    lora_rank: int = 16  # 0 trains all parameters below ℓ
    lora_targets: tuple[str, ...] = ()  # () = every linear layer of the block
    target: float = -1.0  # stop when held-out cross-class cosine is at or below; -1 never stops
    patience: int = 0  # evaluations without improvement before stopping; 0 never stops
    eval_steps: int = 10
    eval_share: float = 0.15  # share of prompts held out for the stop rule
    save_steps: int = 20
    bf16: bool = False
    gradient_checkpointing: bool = False
    max_length: int = 256
    auto_layers: tuple[float, ...] = (0.25, 0.4, 0.5, 0.6, 0.75, 0.9)  # candidates of layer="auto"
    auto_steps: int = 12  # optimiser steps a candidate


@dataclass(frozen=True)
class AlignConfig:
    """Stage 2, safety alignment by SFT (paper section "Method"; Safety-Tuned LLaMAs)."""

    n_general: int = 600
    n_safe: int = 600
    n_augment: int = 0  # STL-aug: seemingly toxic prompts with substantive answers
    augment_source: str = "pairs"  # or coconot-pref (marks CoCoNot in-distribution)
    form_mix: float = (
        0.0  # share of the mix's prompts put into the other form, the same in every role
    )
    labels: str = "completion"  # or all (the paper's reading)
    epochs: float = 1.0
    max_steps: int = 0
    batch_size: int = 16
    accumulation: int = 1
    lr: float = 3e-4
    schedule: str = "constant"  # or linear, cosine; constant keeps checkpoints comparable
    warmup: float = 0.03
    weight_decay: float = 0.0
    lora_rank: int = 8  # 0 trains all parameters
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    above_layer: bool = False  # adapters only in the blocks from ℓ up
    max_length: int = 256
    save_steps: int = 50  # resume points
    checkpoints: str = "log"  # log-spaced steps (0, 1, 2, 4, ...), "last", or a comma list
    bf16: bool = False
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class GenerationConfig:
    """Greedy decoding of answers."""

    max_new_tokens: int = 24
    batch_size: int = 64
    dtype: str = "auto"  # bfloat16 where the hardware has it, else float32
    temperature: float = 0.0  # 0 is greedy
    endpoint: str = ""  # OpenAI-compatible base URL; "" generates locally


@dataclass(frozen=True)
class EvaluationConfig:
    """Judges, statistics and general ability."""

    judge: str = "phrases"  # or learned, consensus, guard:<id or folder>; consensus measured no better on models left out
    curve_judge: str = "phrases"
    bootstrap: int = 1000
    forms: bool = True  # also evaluate every benchmark form-swapped
    forms_limit: int = 0  # prompts of each benchmark that are swapped, stratified; 0 swaps all
    capability_tasks: tuple[str, ...] = ()
    capability_limit: int = 100  # items a task; 0 takes all
    robustness_prompts: int = 40  # prompts a class under each wrapper; 0 skips
    longer_tokens: int = 128  # new tokens of the spot check on what short answers hide; 0 skips it
    longer_prompts: int = 40  # its prompts a class
    bias_sweep: bool = True  # refusal-bias frontier of every method
    quality_endpoint: str = (
        ""  # OpenAI-compatible base URL of the pairwise judge; "" gives no win rate
    )
    quality_model: str = ""
    trajectory_prompts: int = (
        24  # prompts a class for refusal probability and kernel over alignment
    )
    probe_pairs: int = 200  # minimal pairs in the analysis of representations
    kernel_tokens: int = 10  # first tokens the kernel is read on (k of top-k, or probes of all)
    kernel_prompts: int = 8  # prompts a class for the kernel
    kernel_steps: int = 0  # recorded alignment steps at which the kernel is taken; 0 takes all


@dataclass(frozen=True)
class SteeringConfig:
    """SCANS and Surgical at inference time, on the STL model."""

    anchors: int = 64  # prompts a class
    scans_alpha: float = 3.5
    scans_threshold: float = 0.0  # 0: chosen once on held-out prompts
    surgical_lambda: float = 1.0
    surgical_candidates: int = (
        48  # (layer, position) pairs tried, drawn by the seed; 0 tries all, as published
    )
    selfcd_alpha: float = 2.5
    strengths: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)  # multiples swept for the curve


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. `seed` reaches data sampling, adapters, batches and bootstraps."""

    profile: str = "quick"
    seed: int = 0
    methods: tuple[str, ...] = ("base", "STL", "DCR")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    steering: SteeringConfig = field(default_factory=SteeringConfig)

    def to_dict(self) -> dict:
        """Plain nested dict, for manifests and keys."""
        return asdict(self)

    def override(self, overrides: str | Mapping[str, object]) -> Config:
        """A copy with dotted keys replaced: "refine.layer=0.4,align.epochs=2" or the same as a mapping."""
        config = self
        for key, value in parse_overrides(overrides).items():
            config = _set(config, key.split("."), value, key)
        return config


def profiles() -> list[str]:
    """Names of the profiles that ship with the kit."""
    return sorted(p.stem for p in PROFILE_DIR.glob("*.yaml") if p.stem != "methods")


def load_config(
    profile: str, *, seed: int = 0, overrides: str | Mapping[str, object] = ""
) -> Config:
    """The profile's configuration with overrides. Raises DCRError for unknown names and wrong types."""
    if profile not in profiles():
        raise DCRError(
            f"profile {profile!r} is unknown; known: {', '.join(profiles())}.{_near(profile, profiles())}"
        )
    path = PROFILE_DIR / f"{profile}.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    config = Config(profile=profile)
    for key, value in _flatten(content):
        config = _set(config, key.split("."), value, f"{path.name}: {key}")
    return _set(config, ["seed"], seed, "seed").override(overrides)


def parse_overrides(overrides: str | Mapping[str, object]) -> dict[str, object]:
    """ "a.b=1,c=x" → {"a.b": 1, "c": "x"}; commas inside [...] belong to the value; a mapping passes through."""
    if isinstance(overrides, Mapping):
        return dict(overrides)
    parts, depth = [""], 0
    for char in overrides:
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    result: dict[str, object] = {}
    for part in filter(None, (p.strip() for p in parts)):
        key, equals, value = part.partition("=")
        if not equals:
            raise DCRError(
                f"override {part!r} has no '='; write section.field=value, separated by commas."
            )
        result[key.strip()] = yaml.safe_load(value) if value.strip() else ""
    return result


def methods_file() -> dict[str, dict]:
    """Method recipes (profiles/methods.yaml): name → dotted overrides on top of the profile."""
    return yaml.safe_load((PROFILE_DIR / "methods.yaml").read_text(encoding="utf-8"))


def _flatten(content: Mapping, prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        rows += _flatten(value, name + ".") if isinstance(value, Mapping) else [(name, value)]
    return rows


def _set(config, path: list[str], value: object, shown: str):
    names = [f.name for f in dataclasses.fields(config)]
    if path[0] not in names:
        raise DCRError(
            f"{shown}: unknown parameter {path[0]!r}; known here: {', '.join(names)}."
            + _near(path[0], names)
        )
    current = getattr(config, path[0])
    if dataclasses.is_dataclass(current):
        if len(path) == 1:
            raise DCRError(
                f"{shown}: {path[0]} is a section; set one of its fields, e.g. {path[0]}."
                f"{dataclasses.fields(current)[0].name}=..."
            )
        return dataclasses.replace(config, **{path[0]: _set(current, path[1:], value, shown)})
    if len(path) > 1:
        raise DCRError(f"{shown}: {path[0]} is a value, not a section.")
    wanted = typing.get_type_hints(type(config))[path[0]]
    return dataclasses.replace(config, **{path[0]: _typed(value, wanted, shown)})


def _typed(value: object, wanted, shown: str):
    """`value` if it has the wanted type; an int may stand for a float, a list for a tuple; text never for a number."""
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    for option in options:
        if typing.get_origin(option) is tuple:
            item = typing.get_args(option)[0]
            if isinstance(value, (list, tuple)):
                return tuple(_typed(v, item, shown) for v in value)
        elif option is bool or isinstance(value, bool):
            if option is bool and isinstance(value, bool):
                return value
        elif isinstance(value, option):
            return value
        elif option is float and isinstance(value, int):
            return float(value)
        elif option is float and isinstance(value, str) and "e" in value.lower():
            try:  # YAML reads 1e-5 as text
                return float(value)
            except ValueError:
                pass
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise DCRError(f"{shown}: {value!r} is {type(value).__name__}, expected {names}.")


def _near(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f" Did you mean {close[0]!r}?" if close else ""
