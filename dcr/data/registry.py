"""Old name of `dcr.data.sources`, until its callers have switched."""

from dcr.data.sources import SOURCES, source  # noqa: F401
