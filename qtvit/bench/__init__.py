"""Benchmarks: candidates take turns in one process, and what is reported is the ratio to a peer."""
