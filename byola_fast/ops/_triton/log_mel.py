# mypy: ignore-errors
"""lms = log(filter_bank |STFT(wav)|^2 + eps), and (lms - mean) / std: waveforms to log-mels (BYOL-A, arXiv:2103.06695).

Reads wav once, writes lms once. Scratch of fixed size per program: one tile's samples and power spectra.

A program processes a tile of neighbouring frames of one waveform at a time. Sample n = R2 n1 + n2 of a frame goes to
lane n2, and lane k1 computes frequency k = k1 + R1 k2. So both transforms, R1 real points over n1 and R2 complex points
over n2, stay in the registers of one thread, and all butterflies have constant factors: 1024 = 32 x 32, 8 frames, 4
warps. Between them is one exchange through shared memory, which Triton makes from join, permute and split. Rows k1 and
R1 - k1 are conjugates, so rows k1 < R1 / 2 suffice. The real rows 0 and R1 / 2 share one lane: together they hold the
even and odd frequencies of a real transform of 2 R2 points, computed as a complex transform of R2 points; all lanes
separate them afterwards, through scratch. Powers go to the scratch tile [frequency][frame], which stays in the cache.
From there a thread sums four frames of every fourth frequency of a band, with one load for the frames and one for the
weight. Frames that cross an end of their waveform are first copied to scratch with reflection, so that all others load
with constant offsets. No barrier ends a tile: the first one of the next tile comes before any place is written that
another lane may still read. All
arithmetic is float32: benchmarks/gpu/NOTES.md compares products with DFT matrices on tensor cores.
"""
# ruff: noqa: RUF005, SIM108, because Triton adds tuples but does not support (*x, y), and branches on constants

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from byola_fast.ops._triton.shared import EPS, INTERPRETED, launch, logarithm, on_device, resident_programs
from byola_fast.ops.reference import _around, log_mel_reference, num_frames_reference

RADICES = {64: (8, 8), 128: (16, 8), 256: (16, 16), 512: (32, 16), 1024: (32, 32), 2048: (64, 32)}  # n_fft: R1, R2
WARPS = 4
MELS = 16  # bands at a time: neighbours have similar widths
LANES = 32 * WARPS  # R1 / 2 rows for each frame of a tile
COPIED = tl.constexpr(512)  # samples per step
LANES_OF_BAND = 4  # they read neighbouring frequencies
UNROLLED = 2  # frequencies of a band per lane and step
BY_LOADS = tl.constexpr(INTERPRETED)
CIRCLE = tl.constexpr(128)
# one variant for all values: lengths vary, and a hop known to be a multiple of 16 would make loads choose wide layouts
RUNTIME = ["units", "tiles", "samples", "mels", "frames", "hop", "pad"]
COSINES = tl.constexpr(tuple(math.cos(2 * math.pi * j / 128) for j in range(128)))

_tables: dict[tuple[int, torch.device], Tensor] = {}


@triton.constexpr_function
def assembly(code, offset, size):
    """Return the code of an access ``offset`` elements of ``size`` bytes behind its pointer."""
    return code.replace("+", f"+{offset * size}")


@triton.jit
def fetch(place, OFFSET: tl.constexpr = 0):
    """Return what lies at ``place`` + ``OFFSET`` as float32.

    In assembly, because Triton walks the whole kernel for each block that ``tl.load`` loads, to choose its layout: that
    took half a minute. The layout without a choice is right here: neighbouring lanes read neighbouring samples.
    """
    kind: tl.constexpr = place.dtype.element_ty
    if BY_LOADS:
        return tl.load(place + OFFSET).to(tl.float32)
    elif kind == tl.float32:
        return tl.inline_asm_elementwise(
            assembly("ld.global.f32 $0, [$1+];", OFFSET, 4), "=f,l", [place], dtype=tl.float32, is_pure=False, pack=1
        )
    elif kind == tl.int16:
        whole = tl.inline_asm_elementwise(
            assembly("ld.global.s16 $0, [$1+];", OFFSET, 2), "=r,l", [place], dtype=tl.int32, is_pure=False, pack=1
        )
        return whole.to(tl.float32)
    else:
        bits = tl.inline_asm_elementwise(
            assembly("ld.global.u16 $0, [$1+];", OFFSET, 2), "=r,l", [place], dtype=tl.int32, is_pure=False, pack=1
        )
        if kind == tl.bfloat16:
            return (bits << 16).to(tl.float32, bitcast=True)
        else:
            return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def put(place, OFFSET: tl.constexpr, x, MASK: tl.constexpr = False, mask=True):
    """Store float32 at ``place`` + ``OFFSET``, each element by one lane; ``fetch`` has the reason for assembly."""
    if BY_LOADS:
        tl.store(place + OFFSET, x, mask)
    elif MASK:
        code: tl.constexpr = "{.reg .pred p; setp.ne.u32 p, $3, 0; @p st.global.f32 [$1+], $2; mov.u32 $0, 0;}"
        given = [place.to(tl.int64), x, mask.to(tl.int32)]
        tl.inline_asm_elementwise(assembly(code, OFFSET, 4), "=r,l,f,r", given, dtype=tl.int32, is_pure=False, pack=1)
    else:
        code: tl.constexpr = "st.global.f32 [$1+], $2; mov.u32 $0, 0;"
        given = [place.to(tl.int64), x]
        tl.inline_asm_elementwise(assembly(code, OFFSET, 4), "=r,l,f", given, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def butterfly(re, im, other_re, other_im, K: tl.constexpr, N: tl.constexpr):
    """Return z + w^K z' and z - w^K z', w = exp(-2 pi i / N), in six operations: the second is 2 z less the first."""
    cos: tl.constexpr = COSINES[K * (CIRCLE // N) % CIRCLE]
    sin: tl.constexpr = COSINES[(K * (CIRCLE // N) + CIRCLE // 4) % CIRCLE]
    if K == 0:
        return re + other_re, im + other_im, re - other_re, im - other_im
    elif 4 * K == N:
        return re + other_im, im - other_re, re - other_im, im + other_re
    else:
        low_re = tl.fma(other_im, -sin, tl.fma(other_re, cos, re))
        low_im = tl.fma(other_re, sin, tl.fma(other_im, cos, im))
        return low_re, low_im, 2 * re - low_re, 2 * im - low_im


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
            a, b, c, d = butterfly(even_re[k], even_im[k], odd_re[k], odd_im[k], k, N)
            low_re, low_im, high_re, high_im = low_re + (a,), low_im + (b,), high_re + (c,), high_im + (d,)
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
            a, b, c, _d = butterfly(even_re[k], even_im[k], odd_re[k], odd_im[k], k, N)
            d = b - 2 * even_im[k]
            low_re, low_im, high_re, high_im = low_re + (a,), low_im + (b,), (c,) + high_re, (d,) + high_im
        return low_re + (even_im[0],) + high_re, low_im + (-odd_im[0],) + high_im


@triton.jit
def stack(x):
    """Join a tuple of 2^n tensors into one tensor with n more axes of size 2; an earlier reshape would cost moves."""
    if len(x) == 1:
        return x[0]
    else:
        return tl.join(stack(x[0::2]), stack(x[1::2]))


@triton.jit
def unstack(x, N: tl.constexpr):
    """Split a tensor with n last axes of size 2 into a tuple of N = 2^n tensors."""
    if N == 1:
        return (x,)
    else:
        even, odd = tl.split(x)
        evens = unstack(even, N // 2)
        odds = unstack(odd, N // 2)
        both = ()
        for k in tl.static_range(N // 2):
            both = both + (evens[k], odds[k])
        return both


@triton.jit
def exchange(rows, FRAMES: tl.constexpr, N: tl.constexpr):
    """Turn R tensors ``(FRAMES, N)`` into N tensors ``(R FRAMES,)``: one thread's registers go to R threads."""
    R: tl.constexpr = len(rows)
    x = tl.permute(tl.reshape(stack(rows), (FRAMES, N, R)), (2, 0, 1))
    if N == 8:
        return unstack(tl.reshape(x, (R * FRAMES, 2, 2, 2)), N)
    elif N == 16:
        return unstack(tl.reshape(x, (R * FRAMES, 2, 2, 2, 2)), N)
    else:
        return unstack(tl.reshape(x, (R * FRAMES, 2, 2, 2, 2, 2)), N)


@triton.jit
def square(re, im):
    return tl.fma(re, re, im * im)


@triton.jit
def log(x):
    """Return log(x) for x >= eps: the GPU's lg2 instruction for the mantissa alone, with an error of 2^-22 at most."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F400000) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)  # 0.75 to 1.5
    y = tl.fma(exponent.to(tl.float32), 0.6931471805599453, logarithm(mantissa, not BY_LOADS))
    return tl.where(x < float("inf"), y, x)


@triton.jit(do_not_specialize=RUNTIME)
def log_mel_kernel(
    wav,  # (B, samples), the samples of a waveform contiguous
    window,  # (n_fft,) float32
    table,  # (R1 / 2, 2, R2): cosine and sine of -2 pi k1 n2 / n_fft
    filter_bank,  # (F, bins)
    bands,  # (F, 2)
    stats,  # (2,) mean and std, or absent
    lms,  # (B, F, T)
    powers,  # (programs, n_fft + 1 + CHUNK, FRAMES)
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
    LANES_OF_BAND: tl.constexpr,
    UNROLLED: tl.constexpr,
):
    n_fft: tl.constexpr = R1 * R2
    bins: tl.constexpr = n_fft // 2 + 1
    STEP: tl.constexpr = R1 * FRAMES
    CHUNK: tl.constexpr = LANES_OF_BAND * UNROLLED
    mean = 0.0
    scale = 1.0
    if HAS_STATS:
        mean = tl.load(stats).to(tl.float32)
        std = tl.load(stats + 1).to(tl.float32)
        scale = 1 / tl.where(std < EPS, EPS, std)  # NaN stays
    power = powers + tl.program_id(0).to(tl.int64) * ((n_fft + 1 + CHUNK) * FRAMES)
    split = power + (bins + CHUNK) * FRAMES
    piece = pieces + tl.program_id(0).to(tl.int64) * room
    n2 = tl.arange(0, R2)
    f = tl.arange(0, FRAMES)
    lane = tl.arange(0, R1 // 2 * FRAMES)  # k1 FRAMES + f
    packed = lane < FRAMES
    up = tl.where(packed, split + lane, power + lane)
    down = tl.where(packed, split + 2 * FRAMES + lane, power + STEP - lane + 2 * (lane % FRAMES))
    k = tl.minimum(lane // FRAMES, R2 // 2 - 1)
    of_k = split + k * STEP + lane % FRAMES
    of_minus_k = tl.where(k > 0, of_k - STEP + 2 * FRAMES, of_k)
    at_k = power + (k * (STEP // 2) + lane % FRAMES)
    at_minus_k = power + (n_fft // 2 * FRAMES - k * (STEP // 2) + lane % FRAMES)
    distinct = lane < R2 // 2 * FRAMES
    half = split + (R2 // 2 - 1) * STEP + 2 * FRAMES + lane % FRAMES
    band = tl.arange(0, LANES_OF_BAND)
    zeros = tl.arange(0, CHUNK * FRAMES)
    tl.store(power + bins * FRAMES + zeros, 0.0 * zeros)

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
                n = samples - 1 - tl.abs(samples - 1 - tl.abs(begin + i))
                tl.store(piece + i, tl.load(line + n, i < reach, other=0), i < reach)
            tl.debug_barrier()
            source = piece
        else:
            source = line + begin
        places = source + (tl.minimum(f, last_frame) * hop)[:, None] + n2[None, :]
        x = ()
        for n1 in tl.static_range(R1):
            shape = fetch(window + n2, n1 * R2) * SCALE
            if n1 == 0:
                frame = tl.load(places).to(tl.float32)  # its layout, which is that of `fetch`, goes to all that follows
            else:
                frame = fetch(places, n1 * R2)
            x = x + (frame * shape[None, :],)
        re, im = real_dft(x)

        # Rows 0 and R1 / 2 are a + b and a - b. Store (a, b) / 2 as 2 R2 samples; read the even and odd ones.
        corner = split + (f * (2 * R2))[:, None] + n2[None, :]
        put(corner, 0, (re[0] + im[0]) * 0.25)
        put(corner, R2, (re[0] - im[0]) * 0.25)
        tl.debug_barrier()
        rows_re, rows_im = (fetch(corner + n2[None, :]),), (fetch(corner + n2[None, :], 1),)
        for k1 in tl.static_range(1, R1 // 2):
            cos = fetch(table + n2, 2 * k1 * R2)[None, :]
            sin = fetch(table + n2, (2 * k1 + 1) * R2)[None, :]
            rows_re = rows_re + (re[k1] * cos - im[k1] * sin,)
            rows_im = rows_im + (re[k1] * sin + im[k1] * cos,)
        re, im = dft(exchange(rows_re, FRAMES, R2), exchange(rows_im, FRAMES, R2))

        # Z[k] is frequency k1 + R1 k, or its conjugate n_fft - k1 - R1 k. Packed lanes put Z itself aside.
        for k2 in tl.static_range(R2 // 2):
            put(up, k2 * STEP, tl.where(packed, re[k2], square(re[k2], im[k2])))
            put(up, k2 * STEP + FRAMES, im[k2], True, packed)
            put(down, k2 * STEP, tl.where(packed, re[R2 - 1 - k2], square(re[R2 - 1 - k2], im[R2 - 1 - k2])))
            put(down, k2 * STEP + FRAMES, im[R2 - 1 - k2], True, packed)
        tl.debug_barrier()

        # With E and O the transforms of even and odd samples and w = exp(-pi i / R2): Z = (E + i O) / 2,
        # X[k] = E + w^k O is frequency R1 / 2 k, X[R2 - k] = conj(E - w^k O); X[R2 / 2] = 2 conj Z[R2 / 2].
        re, im, other_re, other_im = fetch(of_k), fetch(of_k, FRAMES), fetch(of_minus_k), fetch(of_minus_k, FRAMES)
        cos, sin = fetch(table + 2 * k, R1 // 2 * R2), fetch(table + 2 * k, (R1 // 2 + 1) * R2)
        odd_re, odd_im = im + other_im, other_re - re
        even_re, even_im = re + other_re, im - other_im
        turned_re, turned_im = odd_re * cos - odd_im * sin, odd_re * sin + odd_im * cos
        put(at_k, 0, square(even_re + turned_re, even_im + turned_im), R1 > R2, distinct)
        put(at_minus_k, 0, square(even_re - turned_re, even_im - turned_im), R1 > R2, distinct)
        put(power + lane, n_fft // 4 * FRAMES, 4 * square(fetch(half), fetch(half, FRAMES)), True, packed)
        tl.debug_barrier()

        target = lms + sample * mels * frames + start
        for block in range(0, mels, MELS):
            mel = block + tl.arange(0, MELS)
            first = tl.minimum(tl.maximum(tl.load(bands + 2 * mel, mel < mels, other=0), 0), bins).to(tl.int32)
            last = tl.minimum(tl.maximum(tl.load(bands + 2 * mel + 1, mel < mels, other=0), 0), bins).to(tl.int32)
            width = (last - first)[:, None] - band[None, :]
            weights = filter_bank + (mel * bins + first)[:, None] + band[None, :]
            total = tl.zeros((MELS, LANES_OF_BAND * FRAMES), tl.float32)
            for at in range(0, tl.max(last - first), CHUNK):
                row = tl.minimum(first + at, bins) * FRAMES  # the zeros behind the powers have no weight
                values = power + row[:, None] + tl.arange(0, LANES_OF_BAND * FRAMES)[None, :]
                for i in tl.static_range(UNROLLED):
                    inside = at + i * LANES_OF_BAND < width
                    weight = tl.load(weights + i * LANES_OF_BAND, inside, other=0).to(tl.float32)
                    weight = tl.broadcast_to(weight[:, :, None], (MELS, LANES_OF_BAND, FRAMES))
                    weight = tl.reshape(weight, (MELS, LANES_OF_BAND * FRAMES))
                    total += weight * tl.load(values + i * LANES_OF_BAND * FRAMES)
                weights += CHUNK
            total = tl.reshape(total, (MELS, LANES_OF_BAND, FRAMES))
            y = (log(tl.sum(total, 1) + EPS) - mean) * scale
            written = (mel < mels)[:, None] & (f <= last_frame)[None, :]
            tl.store(target + mel.to(tl.int64)[:, None] * frames + f[None, :], y, written)


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
            wav.new_empty(programs, n_fft + 1 + LANES_OF_BAND * UNROLLED, tile, dtype=torch.float32),
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
            MELS=MELS,
            LANES_OF_BAND=LANES_OF_BAND,
            UNROLLED=UNROLLED,
            num_warps=WARPS,
            maxnreg=65536 // (LANES * resident) // 8 * 8,
        )
    return lms
