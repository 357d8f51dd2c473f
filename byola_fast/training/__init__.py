"""Pre-training: settings, the loop, and the folder of a run."""
