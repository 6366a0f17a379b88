"""Kernel, Proposition 1 and refusal probability of one experiment's models, and their course over alignment.

Every function returns a tidy table; what costs a forward or backward pass is kept in the run directory.
"""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd

from dcr.run.experiment import Experiment

log = logging.getLogger("dcr")


def stored_states(
    experiment: Experiment, method: str, name: str, rows: pd.DataFrame, step: int = -1
):
    """Hidden states of one set of prompts under one method's model, kept on disk."""
    from dcr.data.sets import table_hash
    from dcr.lm.states import HiddenStates, hidden_states

    key = {"weights": experiment.weights_key(method, step), "prompts": table_hash(rows)}

    def build(folder) -> None:
        model, tokenizer = experiment.model(method, step)
        hidden_states(
            model,
            tokenizer,
            rows["text"].tolist(),
            out=folder,
            truncate=True,
            layers_path=experiment.config.model.layers_path,
        )

    artifact = experiment.store.get(
        "states", f"{method}-{name.replace(' ', '-')}".replace(",", ""), key, build
    )
    return HiddenStates(np.load(artifact.path / "values.npy", mmap_mode="r"), "last")


def class_prompts(experiment: Experiment, per_class: int) -> pd.DataFrame:
    """A few held-out prompts of each class, forms mixed: what kernel and rejection probability are followed on."""
    from dcr.data import sets
    from dcr.data.loaders import stratified_subset

    names = {"toxic": "pairs-toxic", "seemingly_toxic": "pairs-safe", "general": "general-test"}
    return pd.concat(
        [
            stratified_subset(sets.table(n), per_class, experiment.config.seed)
            for n in names.values()
        ],
        ignore_index=True,
    )


def _untrained(experiment: Experiment, method: str, step: int) -> tuple[str, int]:
    """("base", -1) for a method that has not trained anything yet, so that the same weights are measured once."""
    return (
        ("base", -1) if step == 0 and "refine" not in experiment.stages(method) else (method, step)
    )


def _kernel(
    experiment: Experiment, method: str, step: int, tokens: str, parameters: str
) -> tuple[pd.DataFrame, np.ndarray]:
    """The kernel's prompts and their ‖K(x', x)‖_F, [n, n]."""
    from dcr.analysis.kernel import entk
    from dcr.data.sets import table_hash

    prompts = class_prompts(experiment, experiment.config.evaluation.kernel_prompts)
    method, step = _untrained(experiment, method, step)
    key = {
        "weights": experiment.weights_key(method, step),
        "prompts": table_hash(prompts),
        "tokens": tokens,
        "parameters": parameters,
        "k": experiment.config.evaluation.kernel_tokens,
        "version": 2,
    }

    def build(folder) -> dict:
        model, tokenizer = experiment.model(method, step)
        texts = prompts["text"].tolist()
        result = entk(
            model,
            tokenizer,
            texts[:-1],
            texts[-1:],
            tokens=tokens,
            parameters=parameters,
            truncate=True,
            k=experiment.config.evaluation.kernel_tokens,
            seed=experiment.config.seed,
            layers_path=experiment.config.model.layers_path,
        )
        norms = np.block([[result.within_a, result.cross], [result.cross.T, result.within_b]])
        np.save(folder / "norms.npy", norms)
        return {"tokens": result.tokens, "prompts": len(texts)}

    artifact = experiment.store.get("kernel", f"{method}@{step}", key, build)
    return prompts, np.load(artifact.path / "norms.npy")


def kernel_table(
    experiment: Experiment,
    method: str,
    step: int = -1,
    *,
    tokens: str = "top-k",
    parameters: str = "blocks",
) -> pd.DataFrame:
    """Rows class_a, class_b, normalised, symmetric with 95 % bootstrap intervals over prompts, for one model.

    step: an alignment step; 0 is the model before alignment (for DCR: after stage 1), -1 the last.
    """
    from dcr.analysis.kernel import class_matrix

    prompts, norms = _kernel(experiment, method, step, tokens, parameters)
    table = class_matrix(norms, prompts["label"].tolist(), seed=experiment.config.seed)
    return table.assign(method=method, step=step, tokens=tokens, parameters=parameters)


def refinement_layer(experiment: Experiment, method: str = "DCR") -> int:
    """ℓ of a method's recipe as a number of blocks (0.75 of the depth where the recipe says "auto")."""
    from dcr.lm.blocks import resolve_layer

    layer = experiment.recipe(method).refine.layer
    return resolve_layer(0.75 if layer == "auto" else layer, experiment.layers(1)[-1])


def proposition(
    experiment: Experiment,
    refined: str = "DCR",
    *,
    tokens: str = "top-k",
    parameters: str = "blocks",
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Proposition 1 before and after refinement: (a row a model with rank correlation and looseness, a row a pair).

    |h'ᵀh| at ℓ against ‖K(x', x)‖_F over pairs of the kernel's prompts, in the base model and after stage 1 of `refined`.
    """
    from dcr.analysis.proposition import bound_check, bound_pairs

    checks, pairs, layer = [], [], refinement_layer(experiment, refined)
    for name, method, step in (("base", "base", -1), (f"{refined} after stage 1", refined, 0)):
        prompts, norms = _kernel(experiment, method, step, tokens, parameters)
        states = stored_states(experiment, method, "kernel-prompts", prompts, step).layer(layer)
        rows = bound_pairs(states, norms, prompts["label"].to_numpy())
        checks.append(
            {"model": name, "layer": layer, **bound_check(rows, seed=experiment.config.seed)}
        )
        pairs.append(rows.assign(model=name, layer=layer))
    check, every = pd.DataFrame(checks), pd.concat(pairs, ignore_index=True)
    experiment.write_table("proposition", check)
    experiment.write_table("proposition_pairs", every)
    return check, every


def refusal_probabilities(
    experiment: Experiment, method: str, step: int, prompts: pd.DataFrame
) -> np.ndarray:
    """[n] refusal probability of prompts under a method's weights after alignment step `step`; cached by weights and prompts."""
    from dcr.analysis.refusal import PHRASES_VERSION, refusal_probability
    from dcr.data.sets import table_hash

    method, step = _untrained(experiment, method, step)
    key = {
        "weights": experiment.weights_key(method, step),
        "prompts": table_hash(prompts),
        "phrases": PHRASES_VERSION,
    }

    def build(folder) -> None:
        model, tokenizer = experiment.model(method, step)
        np.save(
            folder / "probability.npy",
            refusal_probability(model, tokenizer, prompts["text"].tolist(), truncate=True),
        )

    artifact = experiment.store.get("rejection", f"{method}@{step}", key, build)
    return np.load(artifact.path / "probability.npy")


def rejection_table(experiment: Experiment, method: str, step: int = -1) -> pd.DataFrame:
    """Refusal probability of each followed prompt (id, label, form, probability) for one model."""
    prompts = class_prompts(experiment, experiment.config.evaluation.trajectory_prompts)
    return prompts[["id", "label", "form"]].assign(
        probability=refusal_probabilities(experiment, method, step, prompts),
        method=method,
        step=step,
    )


def rejection_reliability(
    experiment: Experiment, method: str = "STL"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Does refusal probability tell which prompts are then refused? (a row of scores, a calibration table.)

    The method's last recorded step; answers generated and judged on the same prompts (the curve's subset).
    """
    from dcr.analysis.refusal import reliability

    step, prompts = experiment.steps(method)[-1], experiment.curve_prompts
    verdicts = prompts[["id"]].merge(
        experiment.verdicts(method, step), left_on="id", right_on="prompt_id", validate="one_to_one"
    )
    scores, table = reliability(
        refusal_probabilities(experiment, method, step, prompts),
        (verdicts["verdict"] == "refuse").to_numpy(),
        seed=experiment.config.seed,
    )
    score, table = (
        pd.DataFrame([scores]).assign(method=method, step=step),
        table.assign(method=method, step=step),
    )
    experiment.write_table(f"reliability_{method}", score)
    experiment.write_table(f"reliability_{method}_bins", table)
    return score, table


def refusal_rates(experiment: Experiment, methods: tuple[str, ...] = ()) -> pd.DataFrame:
    """Share of answers judged `comply` and `refuse` per class over the recorded alignment steps (paper figure 1).

    Rows method, step, label, measure {refusal, compliance}, value, low, high (95 % Wilson), n. DSR is the toxic refusal.
    """
    from dcr.evaluate.metrics import wilson

    rows = []
    for method in methods or _aligning(experiment):
        for step in experiment.steps(method):
            judged = experiment.curve_prompts.merge(
                experiment.verdicts(method, step),
                left_on="id",
                right_on="prompt_id",
                validate="one_to_one",
            )
            for label, part in judged.groupby("label", sort=False):
                for measure, verdict in (("refusal", "refuse"), ("compliance", "comply")):
                    count = int((part["verdict"] == verdict).sum())
                    low, high = wilson(count, len(part))
                    rows.append(
                        {
                            "method": method,
                            "step": step,
                            "label": label,
                            "measure": measure,
                            "value": count / len(part),
                            "low": low,
                            "high": high,
                            "n": len(part),
                        }
                    )
    table = pd.DataFrame(rows)
    experiment.write_table("trajectory_rates", table)
    return table


def _aligning(experiment: Experiment) -> tuple[str, ...]:
    return tuple(m for m in experiment.methods if "align" in experiment.stages(m))


def kernel_steps(steps: list[int], wanted: int) -> list[int]:
    """`wanted` of the recorded steps, first and last included, evenly among them; 0 takes all."""
    if not wanted or wanted >= len(steps):
        return list(steps)
    return sorted({steps[round(i)] for i in np.linspace(0, len(steps) - 1, max(2, wanted))})


def trajectories(experiment: Experiment, methods: tuple[str, ...] = ()) -> dict[str, pd.DataFrame]:
    """Tables `rejection` and `kernel` over the recorded alignment steps of each method (paper figures 1, 3, 6).

    Models are read from the recorded weights after training, so nothing here can change a training run.
    """
    rejection, kernel = [], []
    for method in methods or _aligning(experiment):
        steps = experiment.steps(method)
        rejection += [rejection_table(experiment, method, step) for step in steps]
        kernel += [
            kernel_table(experiment, method, step)
            for step in kernel_steps(steps, experiment.config.evaluation.kernel_steps)
        ]
    tables = {
        "rejection": pd.concat(rejection, ignore_index=True),
        "kernel": pd.concat(kernel, ignore_index=True),
    }
    for name, table in tables.items():
        experiment.write_table(f"trajectory_{name}", table)
    return tables
