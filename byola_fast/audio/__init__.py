"""Audio files, random segments, packed stores, and batches for training."""

from byola_fast.audio.reading import AudioError, audio_duration, read_audio, read_blocks
from byola_fast.audio.segments import read_segment
from byola_fast.audio.sources import Source

__all__ = ["AudioError", "Source", "audio_duration", "read_audio", "read_blocks", "read_segment"]
