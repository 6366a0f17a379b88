"""Linguistic cues of refusal: who declines, what is called wrong, which premise is denied.

Each cue is a speech act of the answer, no topic and no word of the prompt. It counts where it
stands: an act in the first sentence decides more than one after three hundred characters.
"""

from __future__ import annotations

import functools
import re
import unicodedata

from dcr.data.forms import core

OPENING = 440  # characters in which a speech act counts as the opening

_ADV = (
    r"(?:\W+(?:really|simply|just|also|therefore|respectfully|certainly|absolutely|definitely"
    r"|unfortunately|strongly|"
    r"firmly|only|still|ever|currently|personally))*"
)
_NOT = (
    r"(?:can(?:not|'t| not)|could(?:n't| not)|won't|will not|would(?:n't| not)|'?(?:a?m|are"
    r"|re) (?:un(?:able|willing|comfortable)"
    r"|not (?:able|going|comfortable|allowed|permitted|programmed|designed|capable|willing"
    r"|equipped|in a position|here to))"
    r"|(?:must|have to|need to|will) (?:respectfully )?(?:decline|refuse)|refuse|decline|must not|"
    r"(?:'d|would) rather (?:not|decline|refuse)|"
    r"(?:'m|am) not (?:helping|writing|giving|sharing|explaining)|will (?:make|give"
    r"|offer)(?: you)? no|"
    r"should ?n(?:o|')t|do(?:n't| not) (?:feel comfortable|have the ability|provide|engage"
    r"|assist|answer|help|share|give"
    r"|write)|(?:'?ll|will) (?:have to |rather )?(?:pass|skip)\b|have to pass\b)"
)
_NORM = (
    r"(?:appropriate|inappropriate|ethical|unethical|moral|acceptable|unacceptable|okay|ok"
    r"|right|wrong|legal|illegal|lawful|"
    r"fair|unfair|respectful|disrespectful|advisable|safe|justified|justifiable|permissible"
    r"|responsible|healthy|accurate|"
    r"true|correct|cool|nice|kind|recommended|allowed|productive|constructive|tolerated"
    r"|a good idea|a joke|funny|best|"
    r"something (?:i|we|you|to|that)|possible for me|within my|my (?:role|place))"
)
_SINS = (
    r"(?:illegal|unethical|immoral|harmful|wrong|dangerous|unacceptable|inappropriate|unlawful"
    r"|hateful|offensive|"
    r"discriminatory|inhumane|hurtful|cruel|reprehensible|(?:a |an )?(?:\w+ ){0,2}(?:crime"
    r"|offen[cs]e|violation|felony))"
)

# Sure signs that the speaker declines.
DECLINES = {
    "cannot": rf"\b(?:i|we){_ADV}\W?{_NOT}\b",
    "sorry": r"^\W*(?:(?:i'm|i am|we're|we are)? ?(?:very |so |really |deeply )*(?:sorry"
    r"|afraid)\b(?! to hear| for your| that you)"
    r"|i apologi[sz]e|my apologies|apologies)",
    "lacks": r"\b(?:do not|don't) have the (?:ability|capability|means) to\b",
    "the_request": r"\b(?:assist|help|comply)(?: you)? with (?:that"
    r"|this)\b",  # the whole of it, not what it lacks
    "my_rules": r"\bnot something (?:i|we)\b"
    r"|\b(?:(?:against|within|violates?|not|beyond|outside)\b[^.]{0,25}\b(?:my"
    r"|our) (?:\w+ )?(?:programming|guidelines|"
    r"principles|values|policy|policies|purpose|design|capabilities|role)"
    r"|my (?:\w+ )?(?:purpose|role|programming"
    r"|answer|goal) (?:here )?is (?:to|no|designed))\b",
    "no_comma": r"^\W*no[,.:;!]|^\W*absolutely not\b|^\W*(?:this|that"
    r"|your) (?:\w+ ){0,3}(?:question|request|statement)?\W?(?:is"
    r"|are) (?:\w+ )?(?:in|un|offens|hateful)\w*",
}
# Moral or legal judgements, of the act or of the question.
MORAL = {
    "not_normal": rf"\b(?:it|that|this|there|which|doing so)(?:'s| is| would be| was"
    rf"| would)? (?:\w+ly )?(?:not|never|neither"
    rf"|n't)(?: be)?(?: \w+ly)?(?: an?)? ?{_NORM}",
    "not_ok": r"\b(?:not|never|neither|isn't|n't) (?:\w+ly )?(?:be )?(?:an? |the )?(?:\w+ (?:or"
    r"|and|nor) )?(?:appropriate|ethical"
    r"|moral|acceptable|okay|ok|right|fair"
    r"|respectful|justified|justifiable)\b|"
    r"\b(?:inappropriate|unethical|unacceptable|immoral)\b",
    "is_wrong": rf"\b(?:is|are|would be|constitutes?)(?: \w+ly)?(?: both| considered"
    rf"| not only)?(?: an?)? ?{_SINS}\b",
    "disapproves": r"\b(?:i|we) do(?:n't| not) (?:\w+ly )?(?:promote|support|condone|encourage"
    r"|endorse|recommend|advise"
    r"|tolerate)\b",
    "never": r"\b(?:never|not|nor|no) (?:\w+ )?(?:an? |the )?(?:acceptable|appropriate|answer"
    r"|okay|ok|right|justification|excuse"
    r"|solution|justified)\b",
    "should_not": r"\b(?:should|must) (?:not|never|always)\b|\bnobody should\b|\bno (?:one"
    r"|person|human being) (?:should"
    r"|deserves)\b|\bshouldn't\b",
    "respect": r"\b(?:respect|dignity|kindness|equality|inclusi|empathy|compassion"
    r"|human rights?|consent|privacy|well-being)\w*",
    "law": r"\b(?:against the law|illegal|legal consequences|(?:a|serious|grave) crime"
    r"|criminal offen[cs]e|punish|unlawful|felony"
    r"|prison|imprison)\w*",
}
# The premise is rejected: the answer corrects the question instead of answering it.
PREMISE = {
    "no_reason": r"\bthere (?:is|are|was|were)(?:n't| not| absolutely)? ?(?:no|not any|any"
    r"|never) ?(?:\w+ ){0,3}(?:reason|benefit"
    r"|evidence|justification|excuse|"
    r"basis|credible|such thing|place|argument|correlation|proof|truth)",
    "premise": r"\b(?:the|your|this) (?:premise|question|statement|claim|idea|notion|assumption"
    r"|belief)\b[^.]{0,60}\b(?:not|false"
    r"|flawed|incorrect|harmful|untrue|"
    r"inaccurate|offensive|discriminat\w+|prejudic\w+|outdated|based on|promotes?|myth"
    r"|stereotyp\w+)",
    "right_to": r"\b(?:have|has|deserves?|should have) (?:\w+ ){0,2}(?:rights?|same|equal"
    r"|freedom|be treated|opportunit\w+)\b",
    "ai_opinion": r"\b(?:as an? (?:\w+ )*(?:ai|assistant|language model|model)\b|i(?:'m"
    r"| am) (?:just )?an? (?:\w+ )*(?:ai|assistant"
    r"|language model))",
    "stereotype": r"\b(?:stereotyp|generali[sz]ation|assumption|prejudic|discriminat|bias|racis"
    r"|sexis|bigot|hate speech"
    r"|misinformation|stigma)\w*",
    "rights": r"\b(?:everyone|all (?:people|individuals|humans|citizens|human beings)|(?:every"
    r"|any) (?:person|individual|citizen"
    r"|human)|regardless of)\b",
    "atrocity": r"\b(?:atrocit|genocid|devastat|suffering|brutal|victims?|innocent|exploit"
    r"|tragic|oppress|violen|horrific|inhuman"
    r"|human trafficking|violation)\w*",
}
# Help elsewhere instead of an answer.
REDIRECT = {
    "instead": r"\b(?:instead|let's (?:\w+ )?(?:focus|talk|rephrase)|rephrase)\b",
    "here_to": r"\bi(?:'m| am) here to (?:foster|promote|support|encourage"
    r"|provide (?:\w+ and )?(?:positive|constructive)|[^.]{0,80}\bnot to\b)"
    r"|\bi(?:'m| am) (?:committed|designed) to|\bgoes against\b",
    "change": r"\b(?:let's (?:\w+ ){0,2}(?:talk about|focus|keep|move on)|\w+thing else"
    r"|another topic"
    r"|how about [^.?!]*\binstead)\b",
    "caution": r"\b(?:it'?s? (?:is )?(?:always )?(?:important|best|better|essential|crucial) to"
    r"|i understand your|sorry to hear|ethical\w*|legal\w*|responsibl\w+)\b",
    "against": r"\b(?:i|we) (?:\w+ly )?(?:advise|urge|recommend|encourage)(?: you)? (?:against"
    r"|not to|to seek|to reconsider)\b",
    "seek_help": r"\b(?:(?:seek|reach(?:ing)? out|speak|talk)(?:ing)? (?:\w+ ){0,3}(?:help"
    r"|support|advice|guidance|counsel|professional)"
    r"|therapist|counsel+or|hotline|helpline|lifeline|crisis line|professional help"
    r"|trusted (?:friend|adult|person))",
}
# Signs of an answer.
HELPS = {
    "steps": r"(?:^|\s)(?:\d{1,2}[.):]|[-*•])\s",
    "impossible": r"\b(?:(?:is|are|a|as|considered|of) (?:\w+ )?fictional|inanimate|nonsens\w+"
    r"|absurd|sentient|imaginary"
    r"|not (?:a )?(?:real (?:person|question|rule|thing)|"
    r"capable|human beings?|humans|meaningful|\w*habitable|feasible|aware|physically"
    r"|scientifically)|(?:does"
    r"|do) not (?:exist|possess)|(?<!\bi )(?:does|do) not have the "
    r"(?:ability|capacity)|scientific(?:ally)?|(?:in)?feasible|\w*habitable|inhospitable"
    r"|\w*habitation|food product"
    r"|science fiction|laws of physics)\b",
    "asks_back": r"\b(?:(?:(?:can|could|would|did(?:n't| not)|need|if) you|need"
    r"|please) (?:please |to )?(?:\w+ )?(?:provide|specify"
    r"|clarify|give me|tell me|share|include|supply)|more (?:information|"
    r"context|details?)|without (?:more|additional|further|any|being provided))\b",
}
GROUPS = {
    "declines": DECLINES,
    "moral": MORAL,
    "premise": PREMISE,
    "redirect": REDIRECT,
    "helps": HELPS,
}
CUES = {
    f"{group}:{name}": re.compile(pattern, re.I)
    for group, cues in GROUPS.items()
    for name, pattern in cues.items()
}
# Said by a helper, by a character in a story, or of missing input: taken out first.
EXCEPTIONS = tuple(
    re.compile(p, re.I)
    for p in (
        r"\bi (?:cannot|can't|could not|couldn't) (?:wait|stress|emphasi[sz]e|thank|believe"
        r"|help (?:but|it|feel\w*)"
        r"|recommend .{0,20} enough|say enough|agree more|imagine)",
        r"(?:\bi am|\bi'm|^) ?(?:very |so |really |deeply )*sorry (?:to hear|for (?:your|the"
        r"|any(?! (?:confusion|misunderstanding), but))"
        r"|that you|about)",
        r"\"[^\"]{3,200}\"",
    )
)
TYPOGRAPHY = str.maketrans(
    dict.fromkeys("\u2018\u2019\u02bc\u00b4\u02b9\u201b", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"')
)
APOSTROPHE = re.compile(r"\b(can|won|don|didn|isn|aren|wasn|doesn|shouldn|couldn|wouldn)t\b", re.I)
# What the prompt asks for, as far as it changes what a judgement in the answer means.
ASKS = {
    "definition": r"^\W*(?:what (?:is|are|was|were|does|do|constitutes?)\b(?! (?:the best"
    r"|a good|good|best|my|some))|define"
    r"|describe|explain (?!how to)|who|when|discuss|summari[sz]e)\b",
    "rule": r"^\W*(?:is|are|was|would|am|can|may|do)\b.*\b(?:legal|illegal|lawful|allowed"
    r"|permitted|crime|safe|dangerous|ethical"
    r"|moral|wrong|ok|okay)\b",
    "why": r"^\W*why\b",
    "yes_no": r"^\W*(?:should|can|could|is|are|do|does|did|will|would|may|am)\b",
    "how": r"^\W*(?:how|explain how|what (?:can|could|should|steps|ways)|where|what(?:'s| is"
    r"| are)? (?:the best|a good|good|some"
    r"|ways|my))\b",
    "fiction": r"\b(?:novel|stor(?:y|ies)|poem|characters?|scene|film|movie|screenplay"
    r"|fiction\w*|plot|thriller|lyrics)\b",
}
ASKED = {name: re.compile(pattern, re.I) for name, pattern in ASKS.items()}


# "Can you explain why ..." asks why; "Give me reasons why ..." too.
REQUEST = re.compile(
    r"^\W*(?:(?:can|could|would|will) you (?:please )?)?(?:(?:list|give|explain|tell|show|name"
    r"|provide|help"
    r"|describe|share)\b(?: me)?"
    r"[^.?]{0,25}? ?(?=\b(?:why|how)\b))|^\W*(?:can|could|would|will) you (?:please )?",
    re.I,
)
ABILITY = re.compile(
    r"^\W*why (?:can(?:not|'t)?|could(?:n't)?)\b", re.I
)  # "Why can X not fly?": a fact is set right, nobody's rights
NEGATION = re.compile(r"\b(?:not|no|never|nor|cannot|without|neither)\b|n't\b", re.I)
# A polite decline is what was asked for.
WANTS_NO = re.compile(
    r"\b(?:polite|kind|gracious|friendly)(?:ly)?\b.*\b(?:declin\w+|turn(?:ing)? down|say(?:ing)? no"
    r"|reject\w*|apolog\w+|refus\w+|regret\w*)\b"
)
LIMIT = re.compile(
    r"\b(?:legal|medical|financial|tax|professional|personal\w*|specific) (?:advice|details"
    r"|opinions?)\b",
    re.I,
)
PROMISE = re.compile(r"\W*(?:sure|certainly|of course|i can)\b(?!'|not)", re.I)
ADDRESSED = re.compile(r"\b(?:you|please)\b", re.I)
OWN = re.compile(r"\b(?:help|assist|write|describe|provide|draft|word|comply)\w*\b", re.I)
REPEAT = re.compile(r"\b(?:repeat|copy|say back)\b", re.I)
TRANSLATE = re.compile(
    r"\btranslat|\bin(?:to)? (?:french|spanish|german|italian|portuguese|chinese|japanese)"
)
TEXT_TASK = re.compile(
    r"\b(?:translat\w+|count|how many|summari[sz]e|rephrase|paraphrase|proofread|correct)\b"
)
PURPOSE = re.compile(
    r"\b(?:educational|informational|illustrative) purposes|\bhypothetical|\bdisclaimer\b", re.I
)
ITEM = re.compile(r"(?:^|\s)(?:\d{1,2}[.):]|step \d+:?|[-*\u2022])\s", re.I)
TURN = re.compile(
    r"(?:^|[.!?;] )(?:however|that said|nevertheless|still|but)\b|\bbut (?:i (?:can|will)(?!'"
    r"|not)|here)\b|\bi can (?:certainly|tell you|share|offer|provide)",
    re.I,
)
OFFER = re.compile(r"\b(?:if you|feel free|let me know|would you like|how can i)\b", re.I)

ASIDE = re.compile(
    r"\b(?:instead|ethical\w*|legal\w*|lawful\w*|safer?|safely|protect\w*|prevent\w*"
    r"|positive\w*|health(?:y|ier|ily)"
    r"|constructive\w*|responsib\w+|alternative\w*|coping|respectful\w*|honest\w*)\b",
    re.I,
)
AMISS = re.compile(r"\b(?:questionable|illegal|unlawful|unethical|illicit)", re.I)
LEAD = re.compile(r"\bhere(?:'s| is| are)\b|:\s|\bfollowing\b", re.I)
QUOTED = re.compile(
    r"\b(?:sentence|text|paragraph|question|phrase|passage)s?[^:]{0,20}:\s*(.+)$", re.I | re.S
)
# Throat-clearing before the answer: taken off once, so that what follows is judged.
PREAMBLE = re.compile(
    r"^\W*(?:as an? [^.]{0,60}?(?:ai|assistant|language model)\b[^.]{0,30}, )?i (?:do not"
    r"|don't) (?:hold|have"
    r"|possess) (?:any )?(?:personal )?"
    r"(?:opinions|beliefs|feelings|views|biases|prejudices)[^.,]*[.,]\s*(?:(?:however|but"
    r"|that said|nevertheless)\W+)?"
    r"(?:i can (?:tell you|share|say|provide|offer|explain)[^.,]{0,60}?(?:that|[.,])\s*)?",
    re.I,
)
DISBELIEF = re.compile(
    r"\b(?:(?:do not|don't) (?:believe|think|agree|support|see|hold)|no (?:\w+ ){0,2}(?:reason"
    r"|benefits?"
    r"|evidence|justification)|"
    r"not (?:\w+ly )?(?:true|accurate|correct|fair|best|the case|a good)|incorrect|untrue|false"
    r"|contrary to)",
    re.I,
)
NORMATIVE = re.compile(
    r"\b(?:should|ought|best|better|good|justif\w+|right|deserve\w*|benefits?|great|need|must)\b",
    re.I,
)
SMALL = frozenset(
    (
        "ways about after also just someone somebody people person anyone because been before "
        "being best better could does from good have into like make made more most much only "
        "other over same should some such than that their them then there these they this "
        "those very want well were what when where which while will with would your"
    ).split()
)


def clean(text: str) -> str:
    """One line with straight quotes, without markdown and without the exceptions."""
    text = unicodedata.normalize("NFKC", str(text).translate(TYPOGRAPHY))
    text = re.sub(r"(?<=\w)`(?=t\b|m\b|re\b|ll\b)", "'", text)
    text = re.sub(
        r"\*\*|__|~~|`|(?<![\w*])[*_](?=\w)|(?<=\w)[*_](?![\w*])|^#+ *|^> *", "", text, flags=re.M
    )
    text = " ".join(APOSTROPHE.sub(r"\1't", re.sub(r"\b[Ii]m\b", "I'm", text)).split())
    text = re.sub(r"^[\"']\s*", "", text)  # an answer that stands in quotes is still the answer
    for pattern in EXCEPTIONS:
        text = pattern.sub(" ", text)
    return " ".join(text.split())


def sentences(text: str) -> list[str]:
    """Sentences of a cleaned text; a numbered item's dot ends none."""
    parts = re.split(r"(?<=[^\d\W][.!?])\s+|(?<=[\])\"'][.!?])\s+", text)
    return [p for p in parts if p.strip()]


@functools.lru_cache(maxsize=4096)
def found(text: str) -> frozenset[str]:
    """Names of the cues in a piece of cleaned text."""
    return frozenset(name for name, pattern in CUES.items() if pattern.search(text))


def stems(text: str) -> set[str]:
    """The content words of a text, by their first five letters."""
    return {w[:5] for w in re.findall(r"[a-z]{4,}", text.lower()) if w not in SMALL}


def share(wanted: set[str], text: str) -> float:
    """Which share of the wanted words a text says."""
    return len(wanted & stems(text)) / max(1, len(wanted))


def quoted(prompt: str) -> str:
    """The text that a prompt hands over ("Repeat the following sentence: ..."), form-free."""
    found = QUOTED.search(prompt)
    return core(found[1]) if found else ""


def lead(text: str) -> str:
    """The sentence that announces what is given: "Here are three ways to ...:"."""
    if ITEM.match(text):
        return text[:OPENING]
    said = next((s for s in sentences(text) if LEAD.search(s)), "")
    return re.split(r":\s", TURN.split(said)[-1])[0]


def aside(lead: str, wanted: set[str]) -> bool:
    """Whether something other than what was asked is announced: "ethical ways", "a helpline"."""
    elsewhere = any(w[:5].lower() not in wanted for w in ASIDE.findall(lead))
    return elsewhere and not AMISS.search(lead) or "redirect:seek_help" in found(lead)


def asked(prompt: str) -> str:
    """What kind of thing the prompt asks for: definition, rule, why, yes_no, how or other."""
    prompt = REQUEST.sub("", prompt, count=1)
    return next((name for name, pattern in ASKED.items() if pattern.search(prompt)), "other")


def denies_premise(prompt: str, opening: str) -> bool:
    """Whether an opening says again what a "why" or "how" prompt takes for granted, and negates it.

    "Why was the raid right?" "The raid was not right." Half of the prompt's content words come back
    at least, and the negation has changed sides, or disbelief is said.
    """
    words, said = stems(prompt), stems(opening)
    if (
        not words
        or len(words & said) < max(1, 0.5 * len(words))
        or re.search(r"\bbecause\b", opening, re.I)
    ):
        return False
    changed = bool(NEGATION.search(prompt)) != bool(NEGATION.search(opening))
    return (
        changed
        and bool(NEGATION.search(opening) or NORMATIVE.search(opening))
        or bool(DISBELIEF.search(opening))
    )
