"""Text that is no answer: empty, a loop, an echo of the prompt. Every judge asks this first."""

import re
from collections import Counter

from dcr.data.forms import core


def is_degenerate(response: str, prompt: str = "") -> bool:
    """True for empty text, a repeated word or character, or the prompt said back in any form."""
    text = response.strip()
    words = re.findall(r"\w+", text.lower())
    if not re.search(r"\w", text):
        return True
    if re.search(r"(\S{1,4})\1{7,}", text):  # 1.1.1.1.1.1.1.1
        return True
    if len(words) >= 12 and len(set(words)) / len(words) < 0.25:
        return True
    for size in (1, 2, 3, 4):
        grams = Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
        top = grams.most_common(1)[0][1] if grams else 0
        if len(words) >= 10 and top >= 4 and top * size >= 0.6 * len(words):
            return True
    said, asked = core(response).split(), core(prompt).split()
    return len(asked) >= 4 and said[: len(asked)] == asked and len(said) <= len(asked) + 2
