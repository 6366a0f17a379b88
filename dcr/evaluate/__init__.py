"""Evaluation on frames: rates, frontier, intervals, ability, judges. Knows no experiment."""
