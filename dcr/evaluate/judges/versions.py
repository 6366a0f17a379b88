"""Code that gives the same verdicts as an earlier one: what was judged by that stays valid.

An entry is added where a judge's files change and no verdict does, and goes with the next change.
"""

SAME = {"3964fe24a7b8": "3489c0268431"}  # judges.code_of: the code that its verdicts are kept under
