"""Benchmarks of byola_fast: one file per op and one for the whole pipeline. How to run and read them: ``README.md``."""
