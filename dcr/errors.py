"""The one error type users meet: it names what is wrong, where, and the mend."""

from __future__ import annotations


class DCRError(Exception):
    """Bad input or an impossible request. The message names the file, row or parameter and the
    mend."""
