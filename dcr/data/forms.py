"""The form of a prompt, and swapping question ⇄ imperative by fixed templates.

Published benchmarks are nearly all questions on one side and imperatives on the other, so each is
also judged with its forms swapped. A template can bring a bias of its own ("Can you ...?" raises
refusal), so there are several, dealt by a hash of the text. Of 120 swaps that were read, 115 kept
meaning and grammar; the others led to the rules that mend them (`bundled/form_check.csv`).
"""

import hashlib
import re

import pandas as pd

FORMS = ("question", "imperative", "statement")
# {x} is an imperative in lower case without its full stop.
TO_QUESTION = ("Can you {x}?", "Could you {x}?", "Would you {x}?", "Will you {x}?")
# {x} is a question as it stands (without its question mark) or its clause.
TO_IMPERATIVE = ("Answer this: {x}.", "Tell me this: {x}.", "Explain this: {x}.")
TO_IMPERATIVE_CLOSED = TO_IMPERATIVE[:2]  # yes or no, who, when, how many: nothing to explain
HOW = ("Explain how to {x}.", "Describe how to {x}.", "Tell me how to {x}.", "Show me how to {x}.")
_HOW = (
    r"how (?:do|can|could|would|should|might|may) (?:i|you|we|one|someone|somebody|people)"
    r"(?: best)?|how to|what(?: is|'s) the best way to|what are (?:some |good )?ways to"
)
_ASKS_HOW = re.compile(rf"^(?:{_HOW}) (.+)$", re.I)
_TELLS_HOW = re.compile(rf"^(?:{_HOW}|(?:explain|describe|tell me|show me) how to) ")
_ASKS = re.compile(
    r"^(?:can|could|would|will) you (?:please )?(?:be able to )?"
    r"(?!(?:rather|prefer|like|be|ever|not|agree|still|also|feel|believe)\b)(.+)$",
    re.I,
)
_OPEN = re.compile(r"^(?:what|why|how(?! (?:many|much|old|long|far|often)\b))\b", re.I)
_ASKING = "who|whom|what|when|where|why|how|which|whose|is|are|was|were|does|did"
_UNMARKED = re.compile(rf"^(?:{_ASKING})\b", re.I)
_STARTS_QUESTION = re.compile(
    rf"^(?:{_ASKING}|do|can|could|would|should|will|may|might|has|have)\b", re.I
)
_SENTENCE_END = re.compile(  # begins with the space: what can be searched for fast
    r" (?<=[.!?] )(?<!\bMr\. )(?<!\bMs\. )(?<!\bDr\. )(?<!\bSt\. )(?<!\bMrs\. )(?<!\bvs\. )"
    r"(?<!\b[A-Z]\. )(?=[A-Z])"
)
_STARTS_STATEMENT = re.compile(
    r"^(?:i|i'm|i am|we|my|the|this|that|there|it|you|he|she|they)\b", re.I
)


def form_of(text: str) -> str:
    """question: ends in "?"; statement: tells ("I want to ..."); imperative: the rest."""
    text = text.strip().rstrip("\"')")
    if text.endswith("?"):
        return "question"
    return "statement" if _STARTS_STATEMENT.match(text) else "imperative"


def swap_form(text: str) -> str:
    """A question as an imperative, anything else as a question; deterministic."""
    text = re.sub(r"\s+", " ", text.strip())
    return _to_imperative(text) if form_of(text) == "question" else _to_question(text)


def _pick(templates: tuple[str, ...], text: str) -> str:
    return templates[hashlib.sha256(text.encode()).digest()[0] % len(templates)]


def _to_imperative(text: str) -> str:
    *before, last = _SENTENCE_END.split(text)
    body = last.rstrip("?\"' ").strip()
    if match := _ASKS_HOW.match(body):
        swapped = _pick(HOW, text).format(x=match[1])
    elif match := _ASKS.match(body):
        swapped = match[1][0].upper() + match[1][1:] + "."
    else:
        templates = TO_IMPERATIVE if _OPEN.match(body) else TO_IMPERATIVE_CLOSED
        body = body[0].lower() + body[1:] if _STARTS_QUESTION.match(body) else body
        swapped = _pick(templates, text).format(x=body)
    return " ".join([*before, swapped])


def _to_question(text: str) -> str:
    body = text.rstrip(".!:;\"' ").strip()
    if form_of(text) == "statement" or not body:
        return f"{body}. Can you help with that?"
    *before, last = _SENTENCE_END.split(body)
    if before and not _STARTS_STATEMENT.match(last) and not _UNMARKED.match(last):
        # What is asked for stands last.
        return " ".join([*before, _to_question(last)])
    if _UNMARKED.match(body):  # a question that only lacks its mark
        return f"{body}?"
    first = body.split(" ", 1)[0]
    # Keep capitals of acronyms and names; lower only an ordinary first word.
    body = body if first.isupper() and len(first) > 1 else body[0].lower() + body[1:]
    return _pick(TO_QUESTION, text).format(x=re.sub(r"^(?:please|kindly) ", "", body, flags=re.I))


_CARRIER = re.compile(
    r"^(?:(?:can|could|would|will) you|please|kindly|be able to|"
    r"(?:answer|tell me|explain) this)(?: |$)"
)


def core(text: str) -> str:
    """The words of a prompt without its form: the same for a prompt and its swapped twin.

    "How do I fix a bike?" and "Show me how to fix a bike." are both "how to fix a bike".
    """
    parts = []
    text = re.sub(r"\s+", " ", text.strip()).removesuffix(" Can you help with that?")
    for sentence in _SENTENCE_END.split(text):
        words = " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", sentence.lower().replace("’", "'")))
        before = None
        while words != before:
            before, words = words, _TELLS_HOW.sub("how to ", _CARRIER.sub("", words))
        parts.append(words)
    return " ".join(filter(None, parts))


def swap_table(prompts: pd.DataFrame) -> pd.DataFrame:
    """The prompt table with every text swapped: ids get "~", form is read anew, answers stay."""
    texts = [swap_form(t) for t in prompts["text"]]
    forms = [form_of(t) for t in texts]
    return prompts.assign(text=texts, form=forms, id=[f"{i}~" for i in prompts["id"]])
