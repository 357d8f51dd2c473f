"""Benchmarks of byola_fast: one file per op plus the whole pipeline; ``README.md`` tells how to run and read them."""
