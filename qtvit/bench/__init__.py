"""Benchmarks: candidates take turns in one process, and their times are compared with a peer's."""
