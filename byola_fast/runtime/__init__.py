"""The process and its files: devices, ranks, workers, locks, progress."""
