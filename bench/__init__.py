"""Benchmarks: `pytest bench/ --benchmark-only`. A package, so that its test_nci.py is not the one in tests/."""
