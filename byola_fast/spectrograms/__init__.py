"""Log-mel spectrograms and the statistics that normalise them."""
