"""Benchmarks: loading and generation apart from scoring; one small file per benchmark."""
