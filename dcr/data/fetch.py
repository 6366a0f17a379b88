"""Old name of `dcr.data.sources`, until its callers have switched."""

from dcr.data.sources import data_dir, list_sources, path_of, verify  # noqa: F401
