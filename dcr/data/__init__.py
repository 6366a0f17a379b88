"""Prompts: where they come from, how they are read, and which stage sees which."""
