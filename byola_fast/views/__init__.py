"""Two random views of each spectrogram: augmentation, memory bank, pictures."""
