"""The quality of the representations: pre-train on real audio and evaluate on labelled tasks."""
