"""A gate (after CAST, ICLR 2025): a linear probe decides, the model answers what it lets pass.

The probe reads hidden state ℓ of the gated model and is fitted on sources that hold both classes in
both forms: else it reads the source or the form. Layer and place (last template token, last
instruction token, mean over the instruction) by cross-validation on training prompts, one threshold
from validation prompts. Refused prompts get a plain refusal, the others the model's own answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from dcr.analysis.probes import best_layer, fit_probe, is_toxic
from dcr.config import SteeringConfig
from dcr.data.sets import PLAIN_REFUSAL
from dcr.errors import DCRError
from dcr.lm.blocks import truncated
from dcr.lm.chat import FIXED_DAY
from dcr.lm.decode import Unsteered
from dcr.lm.states import Place, residuals
from dcr.steering.hooks import Fit, Material, Steering, rows_of, template_ends

FORMS = ("question", "imperative")
SCRIPT = '''"""A gated model with transformers alone: python use.py "a prompt"."""
import json, pathlib, sys
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
here, prompt = pathlib.Path(__file__).parent, sys.argv[1]
gate = json.loads((here / "steering.json").read_text())
probe = load_file(here / "steering.safetensors")
tokenizer = AutoTokenizer.from_pretrained(here)
model = AutoModelForCausalLM.from_pretrained(here)
chat = [{"role": "user", "content": prompt}]
how = {"date_string": "DAY", "enable_thinking": False}  # as it was fitted
text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **how)
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
states = model(**inputs, output_hidden_states=True).hidden_states[gate["layer"]][0]
state = states[slice(*gate["tokens"])].detach().float().mean(0)
score = float(state @ probe["weight"] + probe["bias"])
answer = gate["refusal"]
if score < gate["threshold"]:
    ids = model.generate(**inputs, max_new_tokens=128, do_sample=False)[0]
    answer = tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(json.dumps({"score": score, "answer": answer}))
'''.replace("DAY", FIXED_DAY.strftime("%d %b %Y"))


@dataclass(frozen=True)
class Deciding(Steering):
    """A method with a score of its own, which refuses from facts["threshold"] on."""

    def refuses(self, model, tokenizer, prompts: Sequence[str]) -> np.ndarray:
        """[n] whether each prompt is refused."""
        return self.decided(self.score(model, tokenizer, prompts))

    def decided(self, scores: np.ndarray) -> np.ndarray:
        """[n] whether scores refuse; the strength multiplies the odds of refusing."""
        with np.errstate(divide="ignore"):
            return scores + np.log(self.strength) >= self.facts["threshold"]


@dataclass(frozen=True)
class Gate(Deciding):
    """facts: layer, tokens [start, stop] (a slice of the prompt, averaged), threshold, refusal.

    Beside them what was measured; tensors: weight [hidden], bias [].
    """

    ANCHORS = ("pairs",)
    script = SCRIPT

    @classmethod
    def fitted(cls, on: Material) -> Fit:
        """The probe from anchors of role pairs (text, label, form, source, request).

        Raises DCRError for a source with one class only, or a class in one form only.
        """
        prompts = on.anchors["pairs"].reset_index(drop=True)
        check_sources(prompts)
        head, tail = template_ends(on.tokenizer)
        places: dict[str, Place] = {
            "template": (-1, None),
            "instruction": (-tail - 1, -tail),
            "mean": (head, -tail),
        }
        states = on.residuals(on.rows("pairs"), list(places.values()))
        found = []
        for i, place in enumerate(places):
            values = states[:, :, i].numpy()
            layer, table = best_layer(values, prompts)
            auroc, loss = table.loc[table["layer"] == layer, ["auroc", "log_loss"]].to_numpy()[0]
            found.append((-float(auroc), float(loss), place, layer, values[layer]))
        _, _, place, layer, chosen = min(found, key=lambda f: f[:2])
        probe = fit_probe(chosen, is_toxic(prompts))
        facts = {
            "layer": layer,
            "place": place,
            "tokens": list(places[place]),
            "refusal": PLAIN_REFUSAL,
            "cross_validated": {f[2]: {"layer": f[3], "auroc": -f[0]} for f in found},
            "sources": sorted(prompts["source"].unique()),
            "prompts": len(prompts),
        }
        kept = {"weight": probe.weight, "bias": probe.bias}
        tensors = {n: torch.tensor(value, dtype=torch.float32) for n, value in kept.items()}
        gate = cls(facts, tensors, layers_path=on.layers_path)
        scores = gate.score(on.model, on.tokenizer, on.validation["text"].tolist())
        return facts | nominal(on.validation, scores, on.options), tensors

    def score(self, model, tokenizer, prompts: Sequence[str]) -> np.ndarray:
        """[n] log odds of toxic; only the blocks up to ℓ run."""
        rows = rows_of(model, tokenizer, prompts)
        layer, place, path = self.facts["layer"], tuple(self.facts["tokens"]), self.layers_path
        with truncated(model, layer, path):
            (states,) = residuals(model, rows, [place], path, slice(layer, None))[:, :, 0]
        return (states.double() @ self.tensors["weight"].double() + self.tensors["bias"]).numpy()

    def start(self, model, tokenizer, prompts: list[str]) -> Unsteered:
        """The plain refusal for each prompt that the probe refuses."""
        refused = np.flatnonzero(self.refuses(model, tokenizer, prompts)).tolist()
        return Unsteered(answers=dict.fromkeys(refused, self.facts["refusal"]))


def check_sources(prompts: pd.DataFrame) -> None:
    """Raise DCRError where a source has one class, or a class one form: a fit would read that."""
    for source, rows in prompts.groupby("source"):
        parts = [("label", "", rows)]
        parts += [
            ("form", f" in its {label} prompts", part) for label, part in rows.groupby("label")
        ]
        for column, where, part in parts:
            found = part[column].unique()
            if len(found) < 2 or (column == "form" and not set(FORMS) <= set(found)):
                raise DCRError(
                    f"source {source!r} holds {column} {', '.join(map(repr, found))} only{where}: "
                    "what is fitted on it reads the source or the form, not harm; take both."
                )


def cells(prompts: pd.DataFrame) -> pd.Series:
    """Weights that add up to 1 in a class: sets equal in it, forms equal in a set; else 0."""
    name = "benchmark" if "benchmark" in prompts else "source"
    counted = prompts[prompts["form"].isin(FORMS)]
    size = counted.groupby(["label", name, "form"])["form"].transform("size")
    forms = counted.groupby(["label", name])["form"].transform("nunique")
    sets = counted.groupby("label")[name].transform("nunique")
    return (1 / (size * forms * sets)).reindex(prompts.index, fill_value=0.0)


def nominal(prompts: pd.DataFrame, scores: np.ndarray, options: SteeringConfig) -> dict:
    """The threshold that refuses the target share of toxic validation prompts, and what it does.

    Raises DCRError without toxic questions or imperatives.
    """
    weights = cells(prompts).to_numpy()
    toxic, harmless = (
        (prompts["label"] == label).to_numpy() & (weights > 0)
        for label in ("toxic", "seemingly_toxic")
    )
    if not toxic.any():
        raise DCRError("no toxic validation prompts to set a threshold on; see data.validation.")
    order = np.argsort(-scores[toxic], kind="stable")
    reached = np.cumsum(weights[toxic][order])
    threshold = float(scores[toxic][order][int((reached < options.target - 1e-9).sum())])
    known, refused = harmless.any(), float(weights[harmless & (scores >= threshold)].sum())
    return {
        "threshold": threshold,
        "target": options.target,
        "validation_auroc": balanced_auroc(prompts, scores) if known else None,
        "validation_refused": refused if known else None,
    }


def balanced_auroc(prompts: pd.DataFrame, scores: np.ndarray) -> float:
    """Mean over harmless sets and pairs of forms of AUROC, toxic against seemingly toxic.

    Raises DCRError where no cell has both classes.
    """
    name = "benchmark" if "benchmark" in prompts else "source"
    rows = prompts.assign(score=scores, weight=cells(prompts).to_numpy())
    rows = rows[rows["form"].isin(FORMS)]
    toxic = rows[rows["label"] == "toxic"]
    harmless = rows[rows["label"] == "seemingly_toxic"]
    found = []
    for form in [f for f in FORMS if (toxic["form"] == f).any()]:
        positive = toxic[toxic["form"] == form]
        for _, negative in harmless.groupby([name, "form"]):
            both = pd.concat([positive, negative]).sort_index()
            truth = both["label"] == "toxic"
            found.append(roc_auc_score(truth, both["score"], sample_weight=both["weight"]))
    if not found:
        raise DCRError("AUROC: no toxic and seemingly toxic questions or imperatives to compare.")
    return float(np.mean(found))
