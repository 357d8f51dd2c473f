"""Find recordings of the same sound, whatever their codec, gain, length or silence around them.

A clip's prints are patches of its log-mel spectrogram that start where its energy rises most, at most two a second:
0.6 s in steps that widen with time, limited to 35 dB below their peak, less most of their spectral tilt, of unit norm.
Two prints match when their inner product reaches ``MATCH``. A clip repeats another when at least half of its prints
match prints of the other, or when it holds at least half of the other's, and two of them: one may be chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

SAMPLE_RATE = 16000
MATCH = 0.95
MATCH_TASK = 0.93  # no clip of a task may be missed
MATCH_HITS = 0.97  # a drum hit louder or softer is another hit
HOP = 160
N_FFT = 512
N_MELS = 32
STEPS = (0, 8, 16, 28, 44, 60)  # frames
SPACING = 50  # frames between two prints
RANGE = 8.0  # nepers of power below the peak, 35 dB: codecs disagree about what is softer
TILT_BANDS = 7
SIZE = N_MELS * (len(STEPS) - 1)


def _mel_weights() -> Floats:
    lowest, highest = 2595 * np.log10(1 + np.array([60.0, 7000.0]) / 700)
    mel = np.linspace(lowest, highest, N_MELS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    bins = np.arange(N_FFT // 2 + 1) * SAMPLE_RATE / N_FFT
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    weights = np.maximum(np.minimum(rising, falling), 0)
    return np.asarray(weights / weights.sum(1, keepdims=True), np.float32)


_MEL = _mel_weights()
_WINDOW = np.hanning(N_FFT).astype(np.float32)


def prints(wav: Floats) -> Floats:
    """Return the prints of a clip at 16 kHz.

    Shape: wav ``(samples,)``; result ``(n, SIZE)``, with n = 0 for silence.
    """
    padded = np.pad(wav, (N_FFT, N_FFT + (STEPS[-1] + 8) * HOP))
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP] * _WINDOW
    mel = (np.abs(np.fft.rfft(frames)) ** 2) @ _MEL.T
    peak = mel.max()
    if peak < 1e-6:
        return np.zeros((0, SIZE), np.float32)
    lms = np.log(np.maximum(mel / peak, np.exp(-RANGE)))
    last = len(lms) - STEPS[-1] - 8
    smooth = (lms[:-2] + lms[1:-1] + lms[2:]) / 3
    rise = np.maximum(smooth[3:] - smooth[:-3], 0).sum(1)[:last]
    rise *= lms[3 : last + 3].max(1) > -0.8 * RANGE
    found = []
    for start in range(0, last, SPACING):
        part = rise[start : start + SPACING]
        at = start + int(part.argmax())
        # the next part finds a rise that its border cuts
        if part.max() > 0 and rise[at] >= rise[max(at - 10, 0) : at + 11].max():
            found.append(at)
    found = found or [int(lms[: max(last, 1)].sum(1).argmax())]
    power = np.stack([np.add.reduceat(mel[at : at + STEPS[-1]], STEPS[:-1]) for at in found])
    power /= np.diff(STEPS)[:, None]
    patches = np.log(np.maximum(power / power.max((1, 2), keepdims=True), np.exp(-RANGE)))
    # most sounds share the tilt of their spectra
    half = TILT_BANDS // 2
    around = np.pad(patches, ((0, 0), (0, 0), (half, half)), mode="edge")
    patches -= 0.7 * np.lib.stride_tricks.sliding_window_view(around, TILT_BANDS, 2).mean(-1)
    flat = patches.reshape(len(found), SIZE)
    flat -= flat.mean(1, keepdims=True)
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6), np.float32)


def near_duplicates(
    queries: Sequence[Floats], others: Sequence[Floats] | None = None, least: float = MATCH, block: int = 512
) -> dict[int, int]:
    """Return near-duplicate clips: index of a query to that of the first clip it repeats.

    Args:
        queries: prints of each clip.
        others: prints of the clips to compare with; None compares each query with the kept ones before it.
        least: the inner product from which two prints match.
    """
    own = others is None
    targets = queries if others is None else others
    if not sum(map(len, queries)) or not sum(map(len, targets)):
        return {}
    clip_of = np.repeat(np.arange(len(targets)), [len(one) for one in targets])
    all_targets = np.concatenate(list(targets))
    first = np.concatenate([[0], np.cumsum([len(one) for one in queries])])
    found: dict[int, int] = {}
    start = 0
    while start < len(queries):
        end = max(int(np.searchsorted(first, first[start] + block, "right")) - 1, start + 1)
        part = np.concatenate(list(queries[start:end]))
        query_of = np.repeat(np.arange(start, end), np.diff(first[start : end + 1]))
        rows, columns = np.nonzero(part @ all_targets[: first[end] if own else None].T >= least)
        hits = Counter(zip(*np.unique(np.stack([rows, clip_of[columns]]), axis=1).tolist(), strict=True))
        counts = Counter((int(query_of[row]), clip) for row, clip in hits)
        inside = np.unique(np.stack([query_of[rows], columns]), axis=1)
        counts_inside = Counter(zip(inside[0].tolist(), clip_of[inside[1]].tolist(), strict=True))
        for query, clip in sorted(counts):
            if own and (clip >= query or clip in found):
                continue
            within = counts_inside[query, clip]
            if 2 * counts[query, clip] >= len(queries[query]) or within >= max(2, len(targets[clip]) / 2):
                found.setdefault(query, clip)
        start = end
    return found
