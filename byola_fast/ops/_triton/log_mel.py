# mypy: ignore-errors
"""lms = log(filter_bank |STFT(wav)|^2 + eps), and (lms - mean) / std: waveforms to log-mels (BYOL-A, arXiv:2103.06695).

Reads wav once, writes lms once. Scratch of fixed size per program: one tile's samples and power spectra.

A program processes a tile of neighbouring frames of one waveform at a time. Sample n = R2 n1 + n2 of a frame goes to
lane n2, and lane k1 computes frequency k = k1 + R1 k2. So both transforms, R1 real points over n1 and R2 complex points
over n2, stay in the registers of one thread, and all butterflies have constant factors: 1024 = 32 x 32, 8 frames, 4
warps. Between them is one exchange through shared memory, which Triton makes from join, permute and split. Rows k1 and
R1 - k1 are conjugates, so rows k1 < R1 / 2 suffice. The real rows 0 and R1 / 2 share one lane: together they hold the
even and odd frequencies of a real transform of 2 R2 points, computed as a complex transform of R2 points and separated
at the end (`two_powers`). Powers go to the scratch tile [frequency][frame], which stays in the cache. From there a
thread sums a band of four frames at a time, with one load for the frames and one for the weight. Frames that cross an
end of their waveform are first copied to scratch with reflection, so that all others load with constant offsets. All
arithmetic is float32: benchmarks/gpu/NOTES.md compares products with DFT matrices on tensor cores.
"""
# ruff: noqa: RUF005, because Triton adds tuples but does not support (*x, y)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from byola_fast.ops._triton.shared import EPS, launch, on_device, resident_programs
from byola_fast.ops.reference import _around, log_mel_reference, num_frames_reference

RADICES = {64: (8, 8), 128: (16, 8), 256: (16, 16), 512: (32, 16), 1024: (32, 32), 2048: (64, 32)}  # n_fft: R1, R2
WARPS = 4
LANES = 32 * WARPS  # R1 / 2 rows for each frame of a tile
COPIED = tl.constexpr(512)  # samples per step
UNROLLED = tl.constexpr(4)  # frequencies of a band per step
CIRCLE = tl.constexpr(128)
# one variant for all values: specialising gains nothing, a compilation takes up to a minute, and lengths vary
RUNTIME = ["units", "tiles", "samples"]
COSINES = tl.constexpr(tuple(math.cos(2 * math.pi * j / 128) for j in range(128)))

_tables: dict[tuple[int, torch.device], Tensor] = {}


@triton.jit
def turn(re, im, K: tl.constexpr, N: tl.constexpr):
    """Return (re + i im) exp(-2 pi i K / N)."""
    cos: tl.constexpr = COSINES[K * (CIRCLE // N) % CIRCLE]
    sin: tl.constexpr = COSINES[(K * (CIRCLE // N) + CIRCLE // 4) % CIRCLE]
    if K == 0:
        return re, im
    elif 4 * K == N:
        return im, -re
    else:
        return re * cos - im * sin, re * sin + im * cos


@triton.jit
def dft(re, im):
    """Return the transform of N complex numbers (two tuples of N tensors): decimation in time, unrolled."""
    N: tl.constexpr = len(re)
    if N == 1:
        return re, im
    else:
        even_re, even_im = dft(re[0::2], im[0::2])
        odd_re, odd_im = dft(re[1::2], im[1::2])
        low_re, low_im, high_re, high_im = (), (), (), ()
        for k in tl.static_range(N // 2):
            turned_re, turned_im = turn(odd_re[k], odd_im[k], k, N)
            low_re = low_re + (even_re[k] + turned_re,)
            low_im = low_im + (even_im[k] + turned_im,)
            high_re = high_re + (even_re[k] - turned_re,)
            high_im = high_im + (even_im[k] - turned_im,)
        return low_re + high_re, low_im + high_im


@triton.jit
def real_dft(x):
    """Return the transform of N real numbers at frequencies 0 to N / 2 - 1.

    The imaginary part at frequency 0 holds the value at N / 2; both values are real. X[k] = E[k] + w^k O[k] and
    X[N / 2 - k] = conj(E[k] - w^k O[k]), with E and O the transforms of the even and odd samples.
    """
    N: tl.constexpr = len(x)
    if N == 2:
        return (x[0] + x[1],), (x[0] - x[1],)
    else:
        even_re, even_im = real_dft(x[0::2])
        odd_re, odd_im = real_dft(x[1::2])
        low_re, low_im = (even_re[0] + odd_re[0],), (even_re[0] - odd_re[0],)
        high_re, high_im = (), ()
        for k in tl.static_range(1, N // 4):
            turned_re, turned_im = turn(odd_re[k], odd_im[k], k, N)
            low_re = low_re + (even_re[k] + turned_re,)
            low_im = low_im + (even_im[k] + turned_im,)
            high_re = (even_re[k] - turned_re,) + high_re
            high_im = (turned_im - even_im[k],) + high_im
        return low_re + (even_im[0],) + high_re, low_im + (-odd_im[0],) + high_im


@triton.jit
def stack(x):
    """Join a tuple of 2^n tensors into one tensor with n more axes of size 2; an earlier reshape would cost moves."""
    if len(x) == 1:
        return x[0]
    else:
        return tl.join(stack(x[0::2]), stack(x[1::2]))


@triton.jit
def unstack(x):
    """Split a tensor ``(A, N)`` into a tuple of N tensors ``(A,)``."""
    A: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    if N == 1:
        return (tl.reshape(x, (A,)),)
    else:
        even, odd = tl.split(tl.reshape(x, (A, N // 2, 2)))
        evens = unstack(even)
        odds = unstack(odd)
        both = ()
        for k in tl.static_range(N // 2):
            both = both + (evens[k], odds[k])
        return both


@triton.jit
def exchange(rows, FRAMES: tl.constexpr, N: tl.constexpr):
    """Turn R tensors ``(FRAMES, N)`` into N tensors ``(R FRAMES,)``: one thread's registers go to R threads."""
    R: tl.constexpr = len(rows)
    x = tl.permute(tl.reshape(stack(rows), (FRAMES, N, R)), (2, 0, 1))
    return unstack(tl.reshape(x, (R * FRAMES, N)))


@triton.jit
def square(re, im):
    return re * re + im * im


@triton.jit
def two_powers(re, im, other_re, other_im, packed, K: tl.constexpr, N: tl.constexpr):
    """Return |Z[K]|^2 and |Z[N - K]|^2; if ``packed``, |X[K]|^2 and |X[N - K]|^2 of the real transform packed in Z.

    With E and O the transforms of even and odd samples and w = exp(-pi i / N): Z = (E + i O) / 2, X[K] = E + w^K O,
    X[N - K] = conj(E - w^K O).
    """
    odd_re, odd_im = turn(im + other_im, other_re - re, K, 2 * N)
    even_re, even_im = re + other_re, im - other_im
    low = square(tl.where(packed, even_re + odd_re, re), tl.where(packed, even_im + odd_im, im))
    high = square(tl.where(packed, even_re - odd_re, other_re), tl.where(packed, even_im - odd_im, other_im))
    return low, high


@triton.jit(do_not_specialize=RUNTIME)
def log_mel_kernel(
    wav,  # (B, samples), the samples of a waveform contiguous
    window,  # (n_fft,) float32
    table,  # (R1 / 2, 2, R2): cosine and sine of -2 pi k1 n2 / n_fft
    filter_bank,  # (F, bins)
    bands,  # (F, 2)
    stats,  # (2,) mean and std, or absent
    lms,  # (B, F, T)
    powers,  # (programs, bins, FRAMES)
    pieces,  # (programs, room), in the dtype of wav
    units,  # tiles of all waveforms
    tiles,  # tiles of one waveform
    samples,
    stride,  # between waveforms
    room,
    mels,
    frames,
    hop,
    pad,
    HAS_STATS: tl.constexpr,
    SCALE: tl.constexpr,  # of the samples
    R1: tl.constexpr,
    R2: tl.constexpr,
    FRAMES: tl.constexpr,
    MELS: tl.constexpr,
):
    n_fft: tl.constexpr = R1 * R2
    bins: tl.constexpr = n_fft // 2 + 1
    mean = 0.0
    scale = 1.0
    if HAS_STATS:
        mean = tl.load(stats).to(tl.float32)
        scale = 1 / tl.maximum(tl.load(stats + 1).to(tl.float32), EPS)
    power = powers + tl.program_id(0).to(tl.int64) * (bins * FRAMES)
    piece = pieces + tl.program_id(0).to(tl.int64) * room
    n2 = tl.arange(0, R2)
    f = tl.arange(0, FRAMES)
    lane = tl.arange(0, R1 // 2 * FRAMES)  # k1 FRAMES + f
    packed = lane < FRAMES

    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        sample = (unit // tiles).to(tl.int64)
        start = unit % tiles * FRAMES
        line = wav + sample * stride
        begin = start * hop - pad
        last_frame = tl.minimum(FRAMES, frames - start) - 1
        reach = last_frame * hop + n_fft
        if (begin < 0) | (begin + reach > samples):
            for at in range(0, reach, COPIED):
                i = at + tl.arange(0, COPIED)
                n = tl.abs(begin + i)
                n = tl.minimum(n, 2 * (samples - 1) - n)
                tl.store(piece + i, tl.load(line + n, i < reach, other=0), i < reach)
            tl.debug_barrier()
            source = piece
        else:
            source = line + begin
        places = source + (tl.minimum(f, last_frame) * hop)[:, None] + n2[None, :]
        x = ()
        for n1 in tl.static_range(R1):
            shape = tl.load(window + n2 + n1 * R2) * SCALE
            x = x + (tl.load(places + n1 * R2).to(tl.float32) * shape[None, :],)
        re, im = real_dft(x)

        # Rows 0 and R1 / 2 are a + b and a - b. Store (a, b) / 2 as 2 R2 samples; read the even and odd ones.
        corner = power + (f * (2 * R2))[:, None] + n2[None, :]
        tl.store(corner, (re[0] + im[0]) * 0.25)
        tl.store(corner + R2, (re[0] - im[0]) * 0.25)
        tl.debug_barrier()
        rows_re, rows_im = (tl.load(corner + n2[None, :]),), (tl.load(corner + n2[None, :] + 1),)
        for k in tl.static_range(1, R1 // 2):
            cos = tl.load(table + n2 + 2 * k * R2)[None, :]
            sin = tl.load(table + n2 + (2 * k + 1) * R2)[None, :]
            rows_re = rows_re + (re[k] * cos - im[k] * sin,)
            rows_im = rows_im + (re[k] * sin + im[k] * cos,)
        re, im = dft(exchange(rows_re, FRAMES, R2), exchange(rows_im, FRAMES, R2))
        tl.debug_barrier()

        # Z[k] is frequency k1 + R1 k, Z[R2 - k] is R1 k - k1; if packed, they are R1 / 2 k and n_fft / 2 - R1 / 2 k.
        rising = power + lane
        falling = power + tl.where(packed, n_fft // 2 * FRAMES + lane, 2 * (lane % FRAMES) - lane)
        up = tl.where(packed, R1 // 2 * FRAMES, R1 * FRAMES)
        down = tl.where(packed, -R1 // 2 * FRAMES, R1 * FRAMES)
        low, high = two_powers(re[0], im[0], re[0], im[0], packed, 0, R2)
        tl.store(rising, low)
        tl.store(falling, high, packed)
        for k in tl.static_range(1, R2 // 2):
            rising += up
            falling += down
            low, high = two_powers(re[k], im[k], re[R2 - k], im[R2 - k], packed, k, R2)
            tl.store(rising, low)
            tl.store(falling, high)
        low, high = two_powers(re[R2 // 2], im[R2 // 2], re[R2 // 2], im[R2 // 2], packed, R2 // 2, R2)
        tl.store(falling + down, high)
        tl.debug_barrier()

        target = lms + sample * mels * frames + start
        for block in range(0, mels, MELS):
            mel = block + tl.arange(0, MELS)
            first = tl.minimum(tl.maximum(tl.load(bands + 2 * mel, mel < mels, other=0), 0), bins).to(tl.int32)
            last = tl.minimum(tl.maximum(tl.load(bands + 2 * mel + 1, mel < mels, other=0), 0), bins).to(tl.int32)
            width = last - first
            weights = filter_bank + mel * bins + first
            values = power + (first * FRAMES)[:, None] + f[None, :]
            total = tl.full((MELS, FRAMES), EPS, tl.float32)
            for at in range(0, tl.max(width), UNROLLED):
                for k in tl.static_range(UNROLLED):
                    inside = at + k < width
                    weight = tl.load(weights + k, inside, other=0).to(tl.float32)
                    total += weight[:, None] * tl.load(values + k * FRAMES, inside[:, None], other=0)
                weights += UNROLLED
                values += UNROLLED * FRAMES
            y = (tl.log(total) - mean) * scale
            written = (mel < mels)[:, None] & (f <= last_frame)[None, :]
            tl.store(target + mel[:, None] * frames + f[None, :], y, written)
        tl.debug_barrier()


def takes(dtype: torch.dtype, samples: int, n_fft: int, hop_length: int) -> bool:
    """Return whether the kernel supports these lengths and this dtype (float32 arithmetic)."""
    short = samples < 2**31 - 64 * max(RADICES)
    return n_fft in RADICES and dtype != torch.float64 and hop_length <= 2 * n_fft and short


def turns(n_fft: int, device: torch.device) -> Tensor:
    """Return the factors between the two transforms, cached by length and device."""
    table = _tables.get((n_fft, device))
    if table is None:
        # The copy from the host synchronises, so that any stream may read the table afterwards. A graph capture allows
        # no such copy: the graph computes its table on the device, at every replay.
        captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        place = device if captured else torch.device("cpu")
        r1, r2 = RADICES[n_fft]
        turned = torch.arange(r1 // 2, dtype=torch.float64, device=place)[:, None] * torch.arange(r2, device=place)
        angle = -2 * math.pi / n_fft * turned
        table = torch.stack([angle.cos(), angle.sin()], 1).float().to(device)
        if not captured:
            _tables[n_fft, device] = table
    return table


def programs_per_sm(wav: Tensor) -> int:
    """Return the number of programs per SM: 128 registers per thread suffice on Hopper; others spill some variants."""
    return 4 if wav.is_cuda and torch.cuda.get_device_capability(wav.device)[0] == 9 else 3


def log_mel(
    wav: Tensor,
    window: Tensor,
    filter_bank: Tensor,
    bands: Tensor,
    stats: Tensor | None,
    n_fft: int,
    hop_length: int,
    center: bool,
) -> Tensor:
    batch, samples = wav.shape
    if not takes(wav.dtype, samples, n_fft, hop_length):
        return log_mel_reference(wav, window, filter_bank, bands, stats, n_fft, hop_length, center)
    mels, frames = len(filter_bank), num_frames_reference(samples, n_fft, hop_length, center)
    whole = not wav.is_floating_point()
    lms = wav.new_empty(batch, mels, frames, dtype=torch.float32 if whole else wav.dtype)
    if not batch:
        return lms
    if wav.stride(1) != 1:
        wav = wav.contiguous()
    if len(window) != n_fft:
        window = torch.nn.functional.pad(window, _around(len(window), n_fft))
    r1, r2 = RADICES[n_fft]
    tile = 2 * LANES // r1
    tiles = triton.cdiv(frames, tile)
    resident, room = programs_per_sm(wav), (tile - 1) * hop_length + n_fft
    programs = min(batch * tiles, resident_programs(wav, resident))
    with on_device(wav):
        launch(
            log_mel_kernel,
            programs,
            wav,
            window.float().contiguous(),
            turns(n_fft, wav.device),
            filter_bank.contiguous(),
            bands.contiguous(),
            window if stats is None else stats.contiguous(),
            lms,
            wav.new_empty(programs, n_fft // 2 + 1, tile, dtype=torch.float32),
            wav.new_empty(programs, room),
            batch * tiles,
            tiles,
            samples,
            wav.stride(0),
            room,
            mels,
            frames,
            hop_length,
            n_fft // 2 if center else 0,
            HAS_STATS=stats is not None,
            SCALE=2.0**-15 if whole else 1.0,
            R1=r1,
            R2=r2,
            FRAMES=tile,
            MELS=min(64, max(16, triton.next_power_of_2(mels))),
            num_warps=WARPS,
            maxnreg=65536 // (LANES * resident) // 8 * 8,
        )
    return lms
