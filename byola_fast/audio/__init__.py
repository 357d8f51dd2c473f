"""Audio files, segments of them, packed stores, and the batches that training reads."""

from byola_fast.audio.reading import AudioError, audio_duration, read_audio, read_blocks

__all__ = ["AudioError", "audio_duration", "read_audio", "read_blocks"]
