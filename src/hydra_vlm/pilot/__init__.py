"""Rates chosen by a pilot: short beginnings of the run, cooled and measured; the winner is gone on from."""
