"""Are the representations good? Pre-train on real audio and evaluate on labelled tasks."""
