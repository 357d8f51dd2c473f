"""Linear evaluation of frozen embeddings on labelled tasks."""
