"""The one error type users meet: it names what is wrong, where, and the mend."""


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: line ends, escapes and the like as codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class DCRError(Exception):
    """Bad input or an impossible request. The message names the file, row or parameter and the
    mend, on one line."""

    def __str__(self) -> str:
        return printable(super().__str__())
