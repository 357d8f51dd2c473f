"""Stages of the GPU check, and compiler reports on the kernels that need no GPU."""
