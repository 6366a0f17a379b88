"""Studies: an experiment of many runs, its tables and figures by name, grids of recipes."""
