"""Every upstream file the kit reads: where it is published, at which revision, its checksum, licence and citation.

The layout on disk is `<dataset>/<file>` below `DCR_DATA_DIR` or the cache. Nothing upstream is in the project.
"""

from __future__ import annotations

from dataclasses import dataclass

from dcr.errors import DCRError

_RAW = "https://raw.githubusercontent.com"
_HUB = "https://huggingface.co/datasets"
_STL = "vinid/safety-tuned-llamas/36a4b8d5c2177ed165bf61f59b590161394f7f12/data"
_OVERKILL = "InvokerStark/OverKill/9551a7ff7b2cb18d178e64fb5cc95e4684311b3b/data"
_XSTEST = "paul-rottger/xstest/d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d"
_COCONOT = "allenai/noncompliance/25bf77cc668814360405cdb8197c4368205806c7/data"
_REFUSAL = "andyrdt/refusal_direction/9d852fae1a9121c78b29142de733cb1340770cc3/dataset/raw"
_GENERAL = "AGI-Edgerunners/LLM-Adapters/816657208af4db747803f87ba40a4c71383fed7a/dataset"


@dataclass(frozen=True)
class Source:
    """One named table. `sha256` is "" where a file is verified by its pinned revision only."""

    name: str
    file: str  # <dataset>/<file> below the data folder
    url: str
    sha256: str
    rows: int  # rows this table has; 0 where unknown
    parser: str  # function name in loaders
    label: str  # default label of its prompts
    role: str  # over_refusal, safety, training, general, completions
    licence: str
    citation: str
    keep: tuple[str, str] | None = None  # (column, value prefix) that selects the rows


def _xs(
    name: str, file: str, sha: str, rows: int, parser: str, label: str, role: str, keep=None
) -> Source:
    return Source(
        name,
        f"xstest/{file.rsplit('/', 1)[-1]}",
        f"{_RAW}/{_XSTEST}/{file}",
        sha,
        rows,
        parser,
        label,
        role,
        "CC-BY-4.0",
        "Röttger et al., XSTest, NAACL 2024",
        keep,
    )


def _stl(
    name: str, path: str, sha: str, rows: int, label: str, role: str, parser: str = "instructions"
) -> Source:
    return Source(
        name,
        f"safety-tuned-llamas/{path.rsplit('/', 1)[-1]}",
        f"{_RAW}/{_STL}/{path}",
        sha,
        rows,
        parser,
        label,
        role,
        "CC-BY-NC-4.0",
        "Bianchi et al., Safety-Tuned LLaMAs, ICLR 2024",
    )


def _general(name: str, file: str, folder: str, sha: str, rows: int) -> Source:
    # Derived: the upstream test.json reparsed into the ai2_arc schema, so the checksum is of the reparsed file.
    return Source(
        name,
        f"general/{file}",
        f"derived from {_RAW}/{_GENERAL}/{folder}/test.json",
        sha,
        rows,
        "multiple_choice",
        "general",
        "general",
        "see the task's authors",
        "Hu et al., LLM-Adapters (reparsed), EMNLP 2023",
    )


_P, _C = "xstest_prompts.csv", "model_completions/xstest_v2_completions_"
_P_SHA = "11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a"

SOURCES: dict[str, Source] = {
    s.name: s
    for s in (
        _xs(
            "xstest-safe",
            _P,
            _P_SHA,
            250,
            "xstest",
            "seemingly_toxic",
            "over_refusal",
            ("label", "safe"),
        ),
        _xs("xstest-unsafe", _P, _P_SHA, 200, "xstest", "toxic", "safety", ("label", "unsafe")),
        _xs(
            "xstest-completions-gpt4",
            _C + "gpt4.csv",
            "71af323af8ecdec0efae23992317721441d2cfedddedeef3248f842f4e15c9ca",
            450,
            "completions",
            "",
            "completions",
        ),
        _xs(
            "xstest-completions-llama2new",
            _C + "llama2new.csv",
            "6365cc55ce0a593c7ab8785853d02784be027d97199d4077912b4313cd010099",
            450,
            "completions",
            "",
            "completions",
        ),
        _xs(
            "xstest-completions-mistralinstruct",
            _C + "mistralinstruct.csv",
            "6a146b65a5b96ec8249729bc2db459697175125998d7cbbcc88f7688ecf31dad",
            450,
            "completions",
            "",
            "completions",
        ),
        Source(
            "oktest",
            "oktest/OKTest.csv",
            f"{_RAW}/{_OVERKILL}/OKTest.csv",
            "1be3e8d3fe6b45a170653da63c8cf70dbf97508a48735e65db0713a44e158860",
            300,
            "prompt_csv",
            "seemingly_toxic",
            "over_refusal",
            "none stated",
            "Shi et al., Navigating the OverKill in LLMs, ACL 2024",
        ),
        Source(
            "oktest-heldout",
            "oktest/OKTest_heldout.csv",
            f"{_RAW}/{_OVERKILL}/OKTest_heldout.csv",
            "af0abf57762023b0302b25107b82de15e6fb2340709b04762fb459e10c6960f7",
            50,
            "prompt_csv",
            "seemingly_toxic",
            "over_refusal",
            "none stated",
            "Shi et al., Navigating the OverKill in LLMs, ACL 2024",
        ),
        Source(
            "coconot",
            "coconot/coconot_contrast_eval.jsonl",
            f"{_RAW}/{_COCONOT}/coconot_contrast_eval.jsonl",
            "76dccec176743ed656279f2969c51abb68bda94e5fda8397e34ff5638e021d86",
            379,
            "coconot",
            "seemingly_toxic",
            "over_refusal",
            "MIT / ODC-BY",
            "Brahman et al., The Art of Saying No, NeurIPS 2024",
        ),
        Source(
            "coconot-pref",
            "coconot/coconot_pref.jsonl",
            f"{_RAW}/{_COCONOT}/coconot_pref.jsonl",
            "3b0cddcfb72218b8c32d7c11bfded00174f2f4a3c4edfbc862640fc63f43d9c2",
            927,
            "coconot",
            "seemingly_toxic",
            "training",
            "MIT / ODC-BY",
            "Brahman et al., The Art of Saying No, NeurIPS 2024",
        ),
        Source(
            "or-bench",
            "or-bench/or-bench-hard-1k.csv",
            f"{_RAW}/mainlp/False-Refusal-Mitigation/916dcac6fb1c5fcccc9581471370645763c65ce6/dataset/raw/"
            "or-bench-hard-1k.csv",
            "a6e2f1166416efe5901f3bb05c47dc92ab3aca3acfe143693d38b8057d841e6d",
            1319,
            "prompt_csv",
            "seemingly_toxic",
            "over_refusal",
            "CC-BY-4.0",
            "Cui et al., OR-Bench, ICML 2025",
        ),
        Source(
            "phtest",
            "phtest/PHTest.jsonl",
            f"{_HUB}/furonghuang-lab/PHTest",
            "",
            3269,
            "phtest",
            "seemingly_toxic",
            "over_refusal",
            "see the hub page",
            "An et al., PHTest, COLM 2024",
            ("Harmfulness", "harmless"),
        ),
        _stl(
            "i-malicious",
            "evaluation/I-MaliciousInstructions.json",
            "7a2bc751d49983800848050282aa2a84b3faa7044c3178228c49dd68df7d679f",
            100,
            "toxic",
            "safety",
        ),
        _stl(
            "i-cona",
            "evaluation/I-CoNa.json",
            "e07d92e376198e60ac1004902dc3fec46513ac70b08d855b4101288b8270d62a",
            178,
            "toxic",
            "safety",
        ),
        _stl(
            "i-controversial",
            "evaluation/I-Controversial.json",
            "0590fc6ee97a39c6a43adc21fe5a4ccbf546ea52e89a32757db6ea3d46ce65c4",
            40,
            "toxic",
            "safety",
        ),
        _stl(
            "q-harm",
            "evaluation/Q-Harm.json",
            "ecc1d19030d41ad550a1e69996dc424074e3e45fb2fa5e8e44b46f294aea295a",
            100,
            "toxic",
            "safety",
        ),
        _stl(
            "i-physical-safe",
            "evaluation/I-PhysicalSafetySafe.json",
            "34c874532623e405fb574f0fa8d6b86cbecce0e3340f67b146a6a6bc2453bed6",
            100,
            "seemingly_toxic",
            "over_refusal",
        ),
        _stl(
            "i-physical-unsafe",
            "evaluation/I-PhysicalSafetyUnsafe.json",
            "16324a2f1ded933e8c7a9f6c7d3924130f76260d03f9df2205e0a25c02de8aae",
            100,
            "toxic",
            "safety",
        ),
        _stl(
            "i-alpaca",
            "evaluation/I-Alpaca.json",
            "30db84ee303df15b653566437ccf1a2fc837caac99a570915d720f65f041fe6d",
            50,
            "general",
            "general",
        ),
        _stl(
            "safety-only",
            "training/safety_only_data_Instructions.json",
            "7dde08acf87f10cf74fd1b76f56538eae8e413ae8e6b09e3f7bcd97769058dbe",
            2483,
            "toxic",
            "training",
            "alpaca",
        ),
        Source(
            "alpaca-demo",
            "alpaca/alpaca_en_demo.json",
            f"{_RAW}/hiyouga/LLaMA-Factory/ff6d4d12eeb035d6ce06805a5733dd7b29f2ac30/data/alpaca_en_demo.json",
            "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
            999,
            "alpaca",
            "general",
            "training",
            "CC-BY-NC-4.0",
            "Taori et al., Stanford Alpaca, 2023",
        ),
        Source(
            "alpaca",
            "alpaca/alpaca.parquet",
            f"{_HUB}/tatsu-lab/alpaca",
            "",
            52002,
            "alpaca",
            "general",
            "training",
            "CC-BY-NC-4.0",
            "Taori et al., Stanford Alpaca, 2023",
        ),
        Source(
            "hh-rlhf",
            "hh-rlhf/red_team_attempts.jsonl.gz",
            f"{_HUB}/Anthropic/hh-rlhf",
            "",
            38961,
            "red_team",
            "toxic",
            "training",
            "MIT",
            "Ganguli et al., Red Teaming Language Models, 2022",
        ),
        Source(
            "advbench",
            "advbench/advbench.csv",
            f"{_RAW}/{_REFUSAL}/advbench.csv",
            "6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1",
            520,
            "prompt_csv",
            "toxic",
            "safety",
            "MIT",
            "Zou et al., Universal and Transferable Adversarial Attacks, 2023",
        ),
        Source(
            "harmbench",
            "harmbench/harmbench_test.csv",
            f"{_RAW}/{_REFUSAL}/harmbench_test.csv",
            "75d257b3e7428c52eb7b0154318f455af3e01b09a3794b5e2f3d36054f3c0e29",
            320,
            "prompt_csv",
            "toxic",
            "safety",
            "MIT",
            "Mazeika et al., HarmBench, ICML 2024",
        ),
        Source(
            "malicious-instruct",
            "malicious-instruct/malicious_instruct.txt",
            f"{_RAW}/{_REFUSAL}/malicious_instruct.txt",
            "a64d69dd1004aac4a23aaff3748fb8f17161893f74db36f45b8bc849eb1bcce5",
            100,
            "lines",
            "toxic",
            "safety",
            "MIT",
            "Huang et al., Catastrophic Jailbreak, ICLR 2024",
        ),
        _general(
            "arc-easy",
            "arc_easy.jsonl",
            "ARC-Easy",
            "14e4fcc379487cbc15450fda23f0f77ad0da2428a22df9426a735ae18be36315",
            2376,
        ),
        _general(
            "arc-challenge",
            "arc_challenge.jsonl",
            "ARC-Challenge",
            "0ee2d67c7c65f7cfffc71e4d7eb3f0d3a3ab45ea07b509ed3f59113f6f1da902",
            1172,
        ),
        _general(
            "openbookqa",
            "openbookqa.jsonl",
            "openbookqa",
            "909d710f684acf88efdc909338b35ef9bd6d409985ce698f12e56eef3c0d4220",
            500,
        ),
        _general(
            "piqa",
            "piqa.jsonl",
            "piqa",
            "e94bc81c636c9fef3afc44ba1cb2fba4bcbfacf6e95042143cd881b55b2325a7",
            1838,
        ),
    )
}
# Hub tables: (repository, revision, file in it). A revision pins the bytes where no checksum is known; PHTest's
# current commit could not be looked up when this was written, so it alone follows the branch.
HUB_FILES = {
    "phtest": ("furonghuang-lab/PHTest", "main", ""),
    "alpaca": (
        "tatsu-lab/alpaca",
        "dce01c9b08f87459cf36a430d809084718273017",
        "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
    ),
    "hh-rlhf": (
        "Anthropic/hh-rlhf",
        "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
        "red-team-attempts/red_team_attempts.jsonl.gz",
    ),
}


def source(name: str) -> Source:
    """The registry entry. Raises DCRError listing the known names."""
    if name not in SOURCES:
        raise DCRError(
            f"data source {name!r} is unknown; known: {', '.join(SOURCES)}; or give the path of a CSV or "
            "JSONL file."
        )
    return SOURCES[name]
