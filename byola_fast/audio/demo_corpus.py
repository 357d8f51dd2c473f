"""A small synthetic corpus, to try the trainer without any audio files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DEMO_RATE = 16000  # Hz
CLIPS = {"notes": 60, "drums": 40, "chirps": 26, "noises": 26}

# Frequency ratio, amplitude and decay rate (1 / s) of each partial; with a decay rate of 0 it lasts the whole note.
TIMBRES: dict[str, list[tuple[float, float, float]]] = {
    "organ": [(ratio, 1.0 / (1 + index), 0.0) for index, ratio in enumerate((1, 2, 3, 4, 6, 8))],
    "flute": [(k, 0.2 ** (k - 1), 0.0) for k in range(1, 5)],
    "reed": [(k, 1.0 / k, 0.0) for k in range(1, 24, 2)],
    "string": [(k, 1.0 / k, 0.3 * k) for k in range(1, 30)],
    "pluck": [(k, 0.8 ** (k - 1), 1.5 + 1.2 * k) for k in range(1, 16)],
    "bell": [(r, 1.0 / (1 + i), 0.8 + 0.9 * i) for i, r in enumerate((0.56, 0.92, 1.19, 1.71, 2.0, 2.74, 3.76, 4.07))],
}


def write_demo_corpus(folder: str | Path, *, seed: int = 0) -> list[Path]:
    """Synthesise about 150 short clips (4 to 6 minutes) of notes, drum hits, chirps and noises.

    Args:
        folder: created if missing; files with the same names are replaced.
        seed: at least 0. Each clip depends on the seed, its kind and its number alone.

    Returns:
        The files, ``folder/<kind>/<sound>_<number>.wav`` with the kinds of ``CLIPS``: 16 kHz mono, 16 bits.
    """
    import numpy as np
    import soundfile

    files = []
    for kind_number, (kind, count) in enumerate(CLIPS.items()):
        subfolder = Path(folder, kind)
        subfolder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            rng = np.random.default_rng([seed, kind_number, number])
            sound, wav = SYNTHESES[kind](rng, number)
            wav *= rng.uniform(0.2, 0.9) / np.abs(wav).max()
            path = subfolder / f"{sound}_{number:03d}.wav"
            soundfile.write(path, wav, DEMO_RATE, subtype="PCM_16")
            files.append(path)
    return files


def _seconds(length: float) -> npt.NDArray[np.floating[Any]]:
    """Sample times of a clip of ``length`` seconds."""
    import numpy as np

    return np.arange(round(length * DEMO_RATE)) / DEMO_RATE


def _phase(frequency: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """Phase in radians of an oscillator with the given frequency (Hz) at every sample."""
    import numpy as np

    return 2 * np.pi * np.cumsum(frequency) / DEMO_RATE


def _coloured_noise(rng: np.random.Generator, samples: int, exponent: float) -> npt.NDArray[np.floating[Any]]:
    """Noise with power proportional to ``1 / f^exponent``: 0 white, 1 pink, 2 brown, -1 blue."""
    import numpy as np

    spectrum = np.fft.rfft(rng.standard_normal(samples))
    spectrum *= np.maximum(np.fft.rfftfreq(samples), 1e-3) ** (-exponent / 2)  # flat below 16 Hz
    return np.fft.irfft(spectrum, samples)


def _note(rng: np.random.Generator, number: int) -> tuple[str, npt.NDArray[np.floating[Any]]]:
    """A held note with vibrato and an attack-decay-sustain-release envelope."""
    import numpy as np

    timbre = list(TIMBRES)[number % len(TIMBRES)]
    t = _seconds(rng.uniform(1.5, 3.5))
    pitch = 440.0 * 2 ** ((rng.integers(36, 92) - 69) / 12)
    vibrato = 1 + rng.uniform(0, 0.006) * np.sin(2 * np.pi * rng.uniform(4, 7) * t)
    phase = _phase(pitch * vibrato)
    wav = np.zeros_like(t)
    for ratio, amplitude, decay in TIMBRES[timbre]:
        if ratio * pitch * 1.006 < DEMO_RATE / 2:  # a partial above would alias
            wav += amplitude * np.exp(-decay * t) * np.sin(ratio * phase + rng.uniform(0, 2 * np.pi))
    attack, decay, release = rng.uniform(0.005, 0.08), rng.uniform(0.05, 0.3), rng.uniform(0.1, 0.5)
    corners = [0.0, attack, attack + decay, t[-1] - release, t[-1]]
    return timbre, wav * np.interp(t, corners, [0.0, 1.0, rng.uniform(0.4, 0.9), rng.uniform(0.3, 0.4), 0.0])


def _drum(rng: np.random.Generator, number: int) -> tuple[str, npt.NDArray[np.floating[Any]]]:
    """A hit or, with probability one half, a short pattern of the same hit."""
    import numpy as np

    sound = ("kick", "snare", "hat", "tom", "clap")[number % 5]
    t = _seconds(rng.uniform(0.3, 0.8))
    noise = rng.standard_normal(len(t))
    if sound in ("kick", "tom"):
        low = rng.uniform(40, 60) if sound == "kick" else rng.uniform(80, 220)
        hit = np.exp(-t * rng.uniform(6, 14)) * np.sin(_phase(low * (1 + rng.uniform(1, 4) * np.exp(-t * 30))))
        hit += 0.05 * noise * np.exp(-t * 200)
    elif sound == "snare":
        hit = 0.6 * np.exp(-t * 18) * np.sin(_phase(np.full_like(t, rng.uniform(150, 220))))
        hit += 0.5 * noise * np.exp(-t * rng.uniform(12, 25))
    elif sound == "hat":
        hit = np.diff(noise, n=2, append=[0.0, 0.0]) * np.exp(-t * rng.uniform(8, 60))
    else:
        bursts = [np.exp(-(t - delay) * 90) * (t >= delay) for delay in (0.0, 0.012, 0.024)]
        hit = noise * (sum(bursts) + 0.5 * np.exp(-t * 15))
    if rng.random() < 0.5:
        return sound, hit
    step = round(rng.uniform(0.12, 0.3) * DEMO_RATE)
    pattern = np.zeros(4 * step + len(hit))
    for beat in range(5):
        pattern[beat * step : beat * step + len(hit)] += rng.uniform(0.4, 1.0) * hit
    return sound, pattern


def _chirp(rng: np.random.Generator, number: int) -> tuple[str, npt.NDArray[np.floating[Any]]]:
    """A sweep, linear or exponential, up or down, or a warble."""
    import numpy as np

    sound = ("linear", "exponential", "warble")[number % 3]
    t = _seconds(rng.uniform(1.2, 3.0))
    low, high = rng.uniform(80, 600), rng.uniform(1500, 7000)
    if rng.random() < 0.5:
        low, high = high, low
    if sound == "linear":
        frequency = np.linspace(low, high, len(t))
    elif sound == "exponential":
        frequency = np.geomspace(low, high, len(t))
    else:
        frequency = np.sqrt(low * high) * 2 ** (rng.uniform(0.2, 0.9) * np.sin(2 * np.pi * rng.uniform(1, 12) * t))
    fade = np.minimum(1, 50 * np.minimum(t, t[-1] - t))  # 20 ms at both ends, against clicks
    return sound, np.sin(_phase(frequency)) * fade


def _noise(rng: np.random.Generator, number: int) -> tuple[str, npt.NDArray[np.floating[Any]]]:
    """Noise of one colour with a slowly changing level."""
    import numpy as np

    sound, exponent = (("white", 0.0), ("pink", 1.0), ("brown", 2.0), ("blue", -1.0))[number % 4]
    t = _seconds(rng.uniform(1.5, 3.5))
    swell = 1 + rng.uniform(0, 0.9) * np.sin(2 * np.pi * rng.uniform(0.3, 4) * t + rng.uniform(0, 2 * np.pi))
    return sound, _coloured_noise(rng, len(t), exponent) * swell


SYNTHESES: dict[str, Callable[[np.random.Generator, int], tuple[str, npt.NDArray[np.floating[Any]]]]] = {
    "notes": _note,
    "drums": _drum,
    "chirps": _chirp,
    "noises": _noise,
}
