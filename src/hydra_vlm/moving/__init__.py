"""Ranks that move: a training that starts wider than the budget and ends inside it."""
