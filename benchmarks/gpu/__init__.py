"""Stages of the GPU check, and what can be known of the kernels without a GPU."""
