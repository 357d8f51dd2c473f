"""Encoders, their moving average, and files of weights."""
