"""Embeddings of sound of any length, written as tables or exported for other runtimes."""
