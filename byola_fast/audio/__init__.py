"""Audio files, random segments, packed stores, and batches for training."""

from byola_fast.audio.reading import AudioError, audio_duration, read_audio, read_blocks

__all__ = ["AudioError", "audio_duration", "read_audio", "read_blocks"]
