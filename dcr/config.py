"""Configuration: frozen, strict pydantic models, profiles in YAML, dotted overrides.

Nothing is coerced and nothing is guessed: an unknown name, a wrong type, a value outside its
choices or bounds raises one DCRError that lists what is known.
"""

import difflib
import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from dcr.errors import DCRError

PROFILE_DIR = Path(__file__).parent / "profiles"
MOST_SEEDS = 1000  # more are a slip of the hand that would fill the memory
# What stands between commas of overrides; those in brackets, braces and quotes part nothing.
PART = re.compile(r"""(?:\[[^\]]*\]|\{[^}]*\}|(?<=[=\s])(?:'[^']*'|"[^"]*")|[^,])+""")


def _number(value: object) -> object:
    """YAML reads 1e-5 as text."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+\.?\d*[eE][+-]?\d+", value):
        return float(value)
    return value


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


NUMBER, TUPLE = BeforeValidator(_number), BeforeValidator(_tuple)
Real = Annotated[float, NUMBER]
Weight = Annotated[float, Ge(0), NUMBER]
Rate = Annotated[float, Gt(0), NUMBER]
Share = Annotated[float, Ge(0), Le(1), NUMBER]
Count = Annotated[int, Ge(0), Lt(2**32)]  # what generators take as a seed
Size = Annotated[int, Ge(1), Lt(2**32)]
Names = Annotated[tuple[str, ...], TUPLE]


class Section(BaseModel):
    """Fields that travel together. Raises DCRError, never pydantic's own error."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise DCRError(_sentence(type(self), values, error)) from None

    def replaced(self, **changes: Any) -> Self:
        """A validated copy with fields replaced."""
        return type(self)(**{**dict(self), **changes})


class ModelConfig(Section):
    """Which causal LM, and how it is loaded."""

    name: str = "embedded"  # "embedded", a local folder or a hub id
    revision: str = ""  # commit on the hub; "" for local models
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of training, states, scores and answers
    device: str = "auto"
    chat_template: Literal["auto", "alpaca"] = "auto"
    layers_path: str = ""  # dotted path of the block list, if the resolver does not find it


class DataConfig(Section):
    """Where prompts come from: a registry name, a table's path, or several joined by "+"."""

    seemingly_toxic: str = "bundled"  # stage 1, harmless side
    toxic: str = "bundled"  # stage 1, toxic side
    align_toxic: str = "bundled"  # stage 2, toxic prompts with safe answers
    general: str = "bundled"  # stage 2, ordinary instructions with answers
    benchmarks: Names = ("pairs-safe", "pairs-toxic", "style-safe", "style-toxic", "general-test")
    validation: Names = ("validation-safe", "validation-toxic", "general-validation")
    n_seemingly_toxic: Count = 250  # paper: XSTest safe; 0 takes all there are
    n_toxic: Count = 500  # paper: HH-RLHF
    # published: bundled harmless prompts as questions, toxic ones as imperatives, as in the paper's
    # sets, to train on and to test "as published"; both: as they were written, half of each
    bundled_forms: Literal["both", "published"] = "both"
    form_mix: Share = 0.0  # stage 1's published prompts put into the other form
    # stage 2 refuses toxic prompts as their source does, or all by one sentence: soon learned
    refusals: Literal["own", "plain"] = "own"
    audited: bool = False  # drop toxic training prompts that the audit calls harmless or ambiguous
    limit: Count = 0  # requests a test or validation set; 0 takes all
    answered: Count = 0  # of them, requests a test set that are answered too; 0: all are
    curve_limit: Count = 400  # prompts (all sets together) judged at each alignment checkpoint


class RefineConfig(Section):
    """Stage 1, contrastive refinement (paper, "Method"; unknown values are ours, see comments)."""

    # ℓ: number of blocks, share of the depth (the paper says "middle"), or "auto": where a
    # cross-validated probe on the base model reads the training classes best
    layer: Size | Annotated[float, Gt(0), Le(1)] | Literal["auto"] = 0.75
    loss: Literal["circle", "supcon", "infonce", "triplet"] = "circle"
    margin: Real = 0.4  # m of Circle loss (pytorch-metric-learning's; unknown in the paper)
    gamma: Rate = 80.0  # γ of Circle loss; temperature⁻¹ for supcon and infonce
    pooling: Literal["last", "mean"] = "last"
    # sources (paper), matched (minimal pairs), sham (labels shuffled)
    pairing: Literal["sources", "matched", "sham"] = "sources"
    balance_forms: bool = False  # draw questions and imperatives equally in both classes
    toxic_share: Share = 0.5  # of a batch
    general_share: Share = 0.0  # of the non-toxic class
    retention: Weight = 0.0  # weight of holding general prompts' states to the frozen base's
    batch_size: Annotated[int, Ge(2)] = 32
    accumulation: Size = 1
    epochs: Rate = 2.0  # passes over the larger class
    max_steps: Count = 0  # 0: from epochs
    lr: Weight = 2e-4
    warmup: Share = 0.1  # share of steps
    lora_rank: Count = 16  # 0 trains the blocks' own weights (embeddings stay)
    lora_targets: Names = ()  # () = every linear layer of the block
    target: Real = -1.0  # stop when held-out cross-class cosine is at or below; -1 never stops
    eval_steps: Size = 10
    eval_share: Share = 0.15  # share of prompts held out for the stop rule
    gradient_checkpointing: bool = False
    max_length: Size = 256
    max_tokens_per_batch: Count = 0  # 0: from the device's memory


class AlignConfig(Section):
    """Stage 2, safety alignment by SFT (paper, "Method"; Safety-Tuned LLaMAs)."""

    n_general: Count = 600
    n_safe: Count = 600
    n_augment: Count = 0  # STL-aug: seemingly toxic prompts with substantive answers
    augment_source: str = "pairs"  # or coconot-pref (marks CoCoNot in-distribution)
    n_pairs: Count = 0  # minimal pairs: the harmless side answered, the toxic side refused
    form_mix: Share = 0.0  # prompts put into the other form, the same in every role
    decision: Literal["", "words"] = ""  # words: every answer begins with refuse or respond
    routing: Weight = 0.0  # weight of tying the decision's log odds to the guide's
    labels: Literal["completion", "all"] = "completion"  # all: the paper's reading
    epochs: Rate = 1.0
    max_steps: Count = 0
    batch_size: Size = 16
    accumulation: Size = 1
    lr: Weight = 3e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # keeps checkpoints comparable
    warmup: Share = 0.03
    weight_decay: Weight = 0.0
    lora_rank: Count = 8  # 0 trains the blocks' own weights
    lora_alpha: Size = 16
    lora_dropout: Share = 0.0
    lora_targets: Names = ("q_proj", "k_proj", "v_proj")
    above_layer: bool = False  # adapters only in the blocks from ℓ up
    max_length: Size = 256
    # steps whose weights are kept: log-spaced (0, 1, 2, 4, ...), the last, or these
    checkpoints: Literal["log", "last"] | Annotated[tuple[Count, ...], TUPLE] = "log"
    gradient_checkpointing: bool = False
    max_tokens_per_batch: Count = 0  # 0: from the device's memory


class GenerationConfig(Section):
    """Decoding of answers."""

    max_new_tokens: Size = 24
    batch_size: Size = 64
    temperature: Weight = 0.0  # 0 is greedy
    endpoint: str = ""  # OpenAI-compatible base URL; "" generates locally
    served: dict[str, str] = {}  # method: name under which the endpoint serves its model
    max_tokens_per_batch: Count = 0  # 0: from the device's memory


class EvaluationConfig(Section):
    """Judges, statistics and general ability."""

    judge: str = "phrases"  # or guard:<id or folder>
    forms: bool = True  # also evaluate every benchmark form-swapped
    forms_limit: Count = 0  # prompts of each benchmark that are swapped; 0 swaps all
    capability_tasks: Names = ()
    capability_limit: Count = 100  # items a task; 0 takes all
    robustness_prompts: Count = 40  # prompts a class under each wrapper; 0 skips
    longer_tokens: Count = 128  # new tokens of the check on what short answers hide; 0 skips it
    longer_prompts: Count = 40  # its prompts a class
    quality_endpoint: str = ""  # OpenAI-compatible URL of the pairwise judge; "": no win rate
    quality_model: str = ""
    trajectory_prompts: Size = 24  # prompts a class: refusal score and kernel over alignment
    probe_pairs: Size = 200  # minimal pairs in the analysis of representations
    kernel_tokens: Size = 10  # first tokens the kernel is read on (k of top-k, or probes of all)
    kernel_prompts: Size = 8  # prompts a class for the kernel
    kernel_steps: Count = 0  # recorded alignment steps with a kernel; 0 takes all


class SteeringConfig(Section):
    """Methods that act at inference time, on the model that methods.yaml names."""

    anchors: Size = 64  # prompts a class
    scans_alpha: Real = 3.5
    scans_threshold: Real = 0.0  # 0: chosen once on validation prompts
    surgical_lambda: Real = 1.0
    surgical_candidates: Count = 48  # (layer, position) pairs tried; 0 tries all, as published
    # share of toxic validation prompts that the nominal threshold of gate and token refuses
    target: Annotated[float, Gt(0), Le(1), NUMBER] = 0.8
    tied_iterations: Size = 4
    strengths: Annotated[tuple[Weight, ...], TUPLE] = (0.0, 0.5, 1.0, 2.0)


class Config(Section):
    """Everything a run depends on. `seed` reaches sampling, adapters, batches and bootstraps."""

    profile: str = "quick"
    seed: Count = 0
    methods: Names = ("base", "STL", "DCR")
    every_seed: Names = ()  # methods that run on every seed, the others on the first; () = all
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    refine: RefineConfig = RefineConfig()
    align: AlignConfig = AlignConfig()
    generation: GenerationConfig = GenerationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    steering: SteeringConfig = SteeringConfig()

    def to_dict(self) -> dict:
        """Plain nested dict, for manifests and keys."""
        return self.model_dump()

    def override(self, overrides: str | Mapping[str, object]) -> Self:
        """A copy with values replaced: "refine.layer=0.4,align.epochs=2", or a mapping.

        A mapping has dotted keys, or sections with mappings of their own.
        """
        sections = [name for name, value in self if isinstance(value, Section)]
        changes: dict[str, Any] = {}
        for key, value in parse_overrides(overrides).items():
            name, dot, field = key.partition(".")
            if name in sections:
                fields = {field: value} if field else value
                if not isinstance(fields, Mapping) or not all(isinstance(f, str) for f in fields):
                    example = next(iter(type(getattr(self, name)).model_fields))
                    raise DCRError(
                        f"{key}: {name} is a section; set one of its fields: {name}.{example}=..."
                    )
                changes[name] = {**changes.get(name, {}), **fields}
            elif dot:
                what = "a value" if name in type(self).model_fields else "unknown"
                raise DCRError(
                    f"{key}: {name!r} is {what}, not a section; sections: {', '.join(sections)}."
                    + near(name, sections)
                )
            else:
                changes[name] = value
        parts = {n: getattr(self, n).replaced(**changes[n]) for n in sections if n in changes}
        return self.replaced(**(changes | parts))


def profiles() -> list[str]:
    """Names of the profiles that ship with the kit."""
    return sorted(p.stem for p in PROFILE_DIR.glob("*.yaml") if p.stem != "methods")


def load_config(
    profile: str, *, seed: int = 0, overrides: str | Mapping[str, object] = ""
) -> Config:
    """The profile's configuration with overrides. Raises DCRError for unknown names and values."""
    if profile not in profiles():
        raise DCRError(
            f"profile {profile!r} is unknown; known: {', '.join(profiles())}."
            + near(str(profile), profiles())
        )
    path = PROFILE_DIR / f"{profile}.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        config = Config(profile=profile).override(content)
    except DCRError as error:
        raise DCRError(f"{path.name}: {error}") from None
    config = config.replaced(seed=seed).override(overrides)
    if (config.profile, config.seed) != (profile, seed):  # else a seed's label would lie
        raise DCRError("overrides: profile and seed have parameters of their own; give those.")
    return config


def parse_overrides(overrides: str | Mapping[str, object]) -> dict[str, object]:
    """ "a.b=1,c=[2,3]" → {"a.b": 1, "c": [2, 3]}, values in YAML; a mapping passes through."""
    if isinstance(overrides, Mapping):
        return {str(key): value for key, value in overrides.items()}
    if not isinstance(overrides, str):
        raise DCRError(f"overrides must be text or a mapping, not {type(overrides).__name__}.")
    result: dict[str, object] = {}
    for part in filter(None, map(str.strip, PART.findall(overrides))):
        key, equals, value = (p.strip() for p in part.partition("="))
        if not equals:
            raise DCRError(
                f"override {part!r} has no '='; write section.field=value, separated by commas."
            )
        try:
            result[key] = yaml.safe_load(value) if value else ""
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:120]
            raise DCRError(
                f"override {key}={value[:120]!r} cannot be read as YAML: {reason}."
            ) from None
    return result


def parse_seeds(seeds: str | int | Iterable[int]) -> tuple[int, ...]:
    """ "0-4", "0,2,5", 3 or [0, 1] → the seeds. Raises DCRError for anything else."""
    one = isinstance(seeds, (str, bytes)) or not isinstance(seeds, Iterable)
    parts: Iterable[object] = str(seeds).split(",") if one else seeds  # type: ignore[assignment]
    found = [re.fullmatch(r"\s*(\d{1,10})\s*(?:-\s*(\d{1,10})\s*)?", str(p)) for p in parts]
    ranges = [range(int(m[1]), int(m[2] or m[1]) + 1) for m in found if m]
    if not ranges or None in found or not all(ranges) or sum(map(len, ranges)) > MOST_SEEDS:
        raise DCRError(f"seeds={seeds!r}: give e.g. 0, 0-4 or 0,2,5; {MOST_SEEDS} at most.")
    return tuple(dict.fromkeys(itertools.chain(*ranges)))


@functools.cache
def methods_file() -> dict[str, dict]:
    """Method recipes (profiles/methods.yaml): name → stages and dotted overrides."""
    return yaml.safe_load((PROFILE_DIR / "methods.yaml").read_text(encoding="utf-8"))


def near(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" where a known name is close, else ""."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _sentence(cls: type[Section], values: Mapping, error: ValidationError) -> str:
    """Pydantic's errors about the first wrong field as one sentence."""
    errors = error.errors()
    field = str(errors[0]["loc"][0])
    section = cls.__name__.removesuffix("Config").lower()
    name = f"{section}.{field}" if section else field
    if errors[0]["type"] == "extra_forbidden":
        known = list(cls.model_fields)
        return f"{name}: unknown parameter; known here: {', '.join(known)}." + near(field, known)
    wanted = dict.fromkeys(
        re.sub(r"^Input should be (a valid )?", "", e["msg"]).replace("tuple", "list")
        for e in errors
        if e["loc"][0] == field
    )
    value = values.get(field)
    choices = re.findall(r"'([^']+)'", " ".join(wanted))
    try:
        shown = repr(value)
    except ValueError:  # Python prints no number so long
        shown = "a number of thousands of digits"
    return f"{name}={shown}: should be {' or '.join(wanted)}." + near(shown.strip("'"), choices)
