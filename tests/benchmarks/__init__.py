"""Speed and memory beside TRL: ``python -m tests.benchmarks``."""
