"""Compile the Triton kernels ahead of time, without a GPU, and report registers, spills, occupancy and code size.

``python -m benchmarks.gpu.kernels`` prints the table for every kernel and architecture. Tests hold them to budgets.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200
REGISTERS, THREADS, BLOCKS, SHARED = (
    65536,
    2048,
    32,
    {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024},
)  # of an SM
BLOCK_SHARED = 1024  # bytes that the system reserves for each block
FLOATS = ("mixup_ratio", "fader_gain", "eps", "momentum", "mean", "std")  # run-time numbers that are no integers


@dataclass(frozen=True)
class Variant:
    """One kernel with the dtypes and constants of one use.

    Attributes:
        kernel: module and name, as "augment_views.augment_views_kernel".
        pointers: element type of each pointer, "fp32" or "i64" and so on.
        constants: compile-time constants, and run-time arguments equal to 1.
        wide: 64-bit integers.
        odd: integers that are not multiples of 16.
        warps: number of warps in a program.
        max_registers: limit per thread, or one for each architecture; None leaves it to the compiler.
        fused: whether the compiler may fuse products and sums.
    """

    kernel: str
    pointers: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    wide: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()
    warps: int = 4
    max_registers: int | dict[int, int] | None = None
    fused: bool = True


@dataclass(frozen=True)
class Resources:
    """Resources of one program.

    Attributes:
        registers: per thread.
        spilled: bytes.
        shared: bytes of shared memory.
        programs: number that fits on an SM.
        instructions: in its machine code.
    """

    registers: int
    spilled: int
    shared: int
    programs: int
    instructions: int


def _names(names: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


def _variants() -> dict[str, Variant]:
    import triton.language as tl

    from byola_fast.ops._triton import augment_views as views_module
    from byola_fast.ops._triton import exact_views as exact_module
    from byola_fast.ops._triton import first_conv as conv_module
    from byola_fast.ops._triton import log_mel as mel_module

    f32 = {"COMPUTE": tl.float32}
    views_pointers = (
        _names("bank stats lam fader scratch", "fp32") | _names("bank_count bank_index rng", "i64") | {"crop": "i32"}
    )
    views_constants = f32 | {
        "HAS_BANK": True, "HAS_STATS": True, "APPROXIMATE": True, "WIDE": False, "EXACT": True, "COLUMNS": 32,
        "ROWS": views_module.WARPS, "STAGED_ROWS": 32, "MIX_BLOCKS": 3, "PREFETCH": True, "x_t": 1, "pool_t": 1,
    }  # fmt: skip
    magic = ("mel_magic", "frame_magic")

    def views(element: str, taps: int, mixup: str = "log", fused: bool = False) -> Variant:
        at_once = views_module.AT_ONCE["bilinear" if taps == 2 else "bicubic"]
        constants = views_constants | {"TAPS": taps, "MIXUP": mixup, "COLUMN_BLOCKS": 3, "RUN": 8}
        constants |= {"BLOCKS_AT_ONCE": at_once[0], "TURNS_AT_ONCE": at_once[1]}
        odd: tuple[str, ...] = (*views_module.RUNTIME, "mel_shift", "frame_shift")
        wide: tuple[str, ...] = magic
        if not fused:
            constants |= {"VIEWS": 2}
            odd += ("first_view",)
        pointers = views_pointers | _names("x pool out", element) | {"sums": "fp64"}
        if fused:
            constants |= {"PUSH": True}
            odd += "pool_offset", "mel_base", "mel_slope", "frame_base", "frame_slope"
            wide += "mel_base", "mel_slope", "frame_base", "frame_slope"
            pointers |= _names("finite done", "i32")
        return Variant(
            "two_views.two_views_kernel" if fused else "augment_views.augment_views_kernel",
            pointers,
            constants,
            wide,
            odd,
            views_module.WARPS,
            {80: 64, 90: 64, 100: 80} if fused else views_module.REGISTERS,
        )

    sample = {"mels": 64, "frames": 96, "x_f": 96, "PUSH": True, "HAS_STATS": True}

    def exact(element: str, taps: int) -> Variant:
        return Variant(
            "exact_views.exact_views_kernel",
            views_pointers
            | _names("x pool out", element)
            | _names("finite start", "i32")
            | {"cursor": "i64", "sums": "fp64"},
            sample
            | {"pool_f": 96, "out_mels": 64, "out_frames": 96, "canvas_mels": 64, "canvas_frames": 144, "stride": 100}
            | {"HAS_BANK": True, "TAPS": taps, "SHARED": True},
            ("mel_base", "mel_slope", "frame_base", "frame_slope"),
            tuple(exact_module.RUNTIME),
            exact_module.WARPS,
            views_module.REGISTERS,
        )

    def ema(online: Any) -> Variant:
        return Variant(
            "ema_update.ema_update_kernel",
            {"table": "i64", "chunks": "i32", "decay": "fp64"},
            {"TARGET": tl.float32, "ONLINE": online, "ALIGNED": True, "CHUNK": 4096},
            warps=8,
            fused=False,
        )

    def log_mel(n_fft: int, element: str) -> Variant:
        r1, r2 = mel_module.RADICES[n_fft]
        sizes = {"R1": r1, "R2": r2, "FRAMES": 2 * mel_module.LANES // r1, "MELS": mel_module.MELS}
        sizes |= {"LANES_OF_BAND": mel_module.LANES_OF_BAND, "UNROLLED": mel_module.UNROLLED}
        return Variant(
            "log_mel.log_mel_kernel",
            _names("window table filter_bank stats lms powers", "fp32")
            | _names("wav pieces", element)
            | {"bands": "i32"},
            sizes | {"HAS_STATS": True, "SCALE": 2.0**-15 if element == "i16" else 1.0},
            odd=tuple(mel_module.RUNTIME),
            max_registers={80: 168, 90: 128, 100: 168},
        )

    tile = f32 | {"PIXELS": 16, "CHANNELS": 64}
    few, sizes = {"ROWS": 256, "CHANNELS": 4}, conv_module.RUNTIME
    incoming = {"grad": "bf16", "which": "u8"}
    parameters = _names("partials weight bias gamma beta stats to_weight to_bias to_gamma to_beta factors", "fp32")
    first = _names("x", "fp32") | {"kept": "fp64"} | parameters
    later = _names("y to_y out", "bf16") | parameters | {"anchors": "fp32"}

    crop = f32 | {"WIDE": False, "COLUMNS": 32, "ROWS": 16, "stride_t": 1}
    crop_odd = ("mel_shift", "frame_shift")
    axis = f32 | {"WIDE": False, "INPUTS": 16, "LINES": 32}
    axis_pointers = _names("grad to_x", "fp32") | {"crop": "i32"}
    crop_pointers = _names("x y", "fp32") | {"crop": "i32"}
    push = f32 | {"HAS_STATS": True, "FLAT": True, "BLOCK": 1024, "stride_t": 1}
    push_pointers = _names("x stats rows", "fp32") | _names("finite done", "i32")
    return {
        "augment_views, bilinear": views("fp32", 2),
        "augment_views, bilinear, bf16": views("bf16", 2),
        "augment_views, bicubic": views("fp32", 4),
        "augment_views, bicubic, bf16": views("bf16", 4),
        "augment_views, Gaussian": views("fp32", 2, "gaussian"),
        "two_views": views("fp32", 2, fused=True),
        "two_views, bf16": views("bf16", 2, fused=True),
        "two_views, bicubic": views("fp32", 4, fused=True),
        "finish_views": Variant(
            "two_views.finish_views_kernel",
            _names("views x stats rows", "fp32")
            | _names("finite done", "i32")
            | _names("cursor rng", "i64")
            | {"sums": "fp64"},
            f32
            | dict.fromkeys(("NORMALIZE", "PUSH", "ADVANCE", "HAS_STATS", "FLAT"), True)
            | {"SUMS": 1024, "FLAGS": 1024, "PUSH_BLOCK": 2048, "BLOCK": 2048, "x_t": 1},
            odd=("rows_of_sums", "batch", "n_memory", "pushing"),
            warps=8,
            max_registers=64,
        ),
        "exact_views": exact("fp32", 2),
        "exact_views, bf16": exact("bf16", 2),
        "exact_views, bicubic": exact("fp32", 4),
        "finish_exact_views": Variant(
            "exact_views.finish_exact_views_kernel",
            _names("views x stats bank", "fp32")
            | _names("finite start", "i32")
            | _names("cursor rng", "i64")
            | {"sums": "fp64"},
            sample
            | {"views_numel": 6144, "NORMALIZE": True, "ADVANCE": True, "BLOCK": 1024, "SUMS": exact_module.SUMS},
            odd=tuple(exact_module.RUNTIME),
            warps=exact_module.WARPS,
            max_registers=views_module.REGISTERS,
        ),
        "draw_params": Variant(
            "draw_params.draw_params_kernel",
            _names("rng bank_count bank_index", "i64") | _names("lam fader", "fp32") | {"crop": "i32"},
            {"HAS_BANK": True, "BLOCK": 128},
            ("mel_base", "mel_slope", "frame_base", "frame_slope"),
            ("batch", "pool", "pool_offset", "sample_offset", "canvas_mels", "canvas_frames", "views", "first_view"),
        ),
        "write_inputs": Variant(
            "write_inputs.write_inputs_kernel",
            {"rng": "i64", "stats": "fp32"},
            {"HAS_STATS": True},
            odd=("low", "high", "step"),
        ),
        "ema_update": ema(tl.float32),
        "ema_update, bf16 online": ema(tl.bfloat16),
        "normalize": Variant(
            "normalize.normalize_kernel",
            _names("x y", "fp32") | {"sums": "fp64"},
            f32 | {"SUMS": 512, "BLOCK": 2048},
            warps=8,
            max_registers=64,
        ),
        "sample_sums": Variant("normalize.sample_sums_kernel", {"x": "fp32", "sums": "fp64"}, {"BLOCK": 1024}),
        "batch_stats": Variant("normalize.batch_stats_kernel", {"stats": "fp32", "sums": "fp64"}, {"SUMS": 256}),
        "running_stats": Variant(
            "normalize.running_stats_kernel",
            _names("mean variance stats", "fp32") | _names("count updates", "i64") | {"sums": "fp64"},
            f32 | {"SUMS": 256},
        ),
        "bank_push, flags": Variant("bank_push.find_finite_kernel", push_pointers, push),
        "bank_push, rows": Variant(
            "bank_push.bank_push_kernel",
            push_pointers | {"cursor": "i64"},
            push | {"FLAGS": 1024},
            odd=("batch", "n_memory"),
        ),
        "log_mel": log_mel(1024, "fp32"),
        "log_mel, int16, 256": log_mel(256, "i16"),
        "log_mixup_exp": Variant(
            "log_mixup_exp.log_mixup_exp_kernel",
            _names("x z lam y", "fp32"),
            f32 | {"APPROXIMATE": True, "BLOCK": 1024},
        ),
        "log_mixup_exp, backward": Variant(
            "log_mixup_exp.log_mixup_exp_backward_kernel",
            _names("grad x z lam to_x to_z", "fp32"),
            f32 | {"BLOCK": 1024},
        ),
        "resize_crop, bilinear": Variant(
            "resize_crop.resize_crop_kernel", crop_pointers, crop | {"TAPS": 2}, magic, crop_odd
        ),
        "resize_crop, bicubic": Variant(
            "resize_crop.resize_crop_kernel", crop_pointers, crop | {"TAPS": 4}, magic, crop_odd
        ),
        "resize_crop, backward": Variant(
            "resize_crop.resize_axis_backward_kernel",
            axis_pointers,
            axis | {"AXIS": 0, "TAPS": 4, "grad_n": 1, "x_n": 1},
            ("magic",),
            ("shift",),
        ),
        "conv_block, moments": Variant("first_conv.patch_moments_kernel", first, f32 | {"BLOCK": 128}, odd=sizes),
        "conv_block, first statistics": Variant(
            "first_conv.first_stats_kernel", first, {"ROWS": 64, "CHANNELS": 4}, odd=sizes
        ),
        "conv_block, first": Variant(
            "first_conv.first_forward_kernel", first | {"out": "bf16", "which": "u8"}, tile, odd=sizes
        ),
        "conv_block, first sums": Variant("first_conv.first_sums_kernel", first | incoming, tile, odd=sizes),
        "conv_block, first backward": Variant(
            "first_conv.first_backward_kernel", first, few | f32 | {"FROZEN": False}, odd=sizes
        ),
        "conv_block, sums": Variant(
            "norm_pool.channel_sums_kernel", later, f32 | {"POSITIONS": 64, "CHANNELS": 64}, odd=sizes
        ),
        "conv_block, statistics": Variant("norm_pool.channel_stats_kernel", later, few, odd=sizes),
        "conv_block, frozen": Variant(
            "norm_pool.frozen_stats_kernel", _names("mean variance bias stats", "fp32"), {"BLOCK": 64}, warps=1
        ),
        "conv_block, pool": Variant("norm_pool.pool_kernel", later | incoming, tile, odd=sizes),
        "conv_block, pooled sums": Variant("norm_pool.pool_sums_kernel", later | incoming, tile, odd=sizes),
        "conv_block, norm backward": Variant(
            "norm_pool.norm_backward_kernel", later, few | f32 | {"FROZEN": False}, odd=sizes
        ),
        "conv_block, unpool": Variant("norm_pool.unpool_kernel", later | incoming, tile, odd=sizes),
        "conv_block, running": Variant(
            "norm_pool.norm_running_kernel",
            _names("mean variance stats", "fp32") | {"updates": "i64"},
            {"BLOCK": 64},
            warps=1,
        ),
    }  # fmt: skip


def compile_variant(variant: Variant, architecture: int, kernel: Any = None) -> Any:
    """Compile one variant for one architecture, without a GPU. ``kernel`` is for kernels outside the package."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if kernel is None:
        module, name = variant.kernel.split(".")
        kernel = getattr(importlib.import_module(f"byola_fast.ops._triton.{module}"), name)
    signature, attributes = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in variant.constants:
            signature[argument] = "constexpr"
        elif argument in variant.pointers:
            signature[argument] = "*" + variant.pointers[argument]
        else:
            signature[argument] = "fp32" if argument in FLOATS else "i64" if argument in variant.wide else "i32"
        if signature[argument] != "constexpr" and argument not in (*variant.wide, *variant.odd, *FLOATS):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=variant.constants, attrs=attributes)
    limit = variant.max_registers
    limit = limit[architecture] if isinstance(limit, dict) else limit
    options = {"num_warps": variant.warps, "maxnreg": limit, "enable_fp_fusion": variant.fused}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def tool(name: str) -> str:
    """Return the path of a CUDA tool that Triton ships."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def disassemble(compiled: Any) -> str:
    """Return the machine code of a compiled kernel as text."""
    return _on_cubin(compiled, [tool("nvdisasm"), "-c"])


def _on_cubin(compiled: Any, command: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        return subprocess.run([*command, str(path)], capture_output=True, text=True, check=True).stdout


def resources(compiled: Any, architecture: int, warps: int) -> Resources:
    """Return the resources of one program of a compiled kernel."""
    usage = _on_cubin(compiled, [tool("cuobjdump"), "-res-usage"])
    registers, stack, local = (int(re.findall(rf"\b{name}:(\d+)", usage)[0]) for name in ("REG", "STACK", "LOCAL"))
    code = disassemble(compiled)
    spilled = max(stack, local, 4 * len(re.findall(r"\b(?:LDL|STL)\b", code)))
    threads = 32 * warps
    declared = re.findall(r"\.shared \.align \d+ \.b8 \w+\[(\d+)\]", compiled.asm["ptx"])
    shared = int(compiled.metadata.shared) + sum(map(int, declared))
    programs = min(
        REGISTERS // (-(-registers // 8) * 8 * threads),
        THREADS // threads,
        BLOCKS,
        SHARED[architecture] // (shared + BLOCK_SHARED),
    )
    return Resources(registers, spilled, shared, programs, len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M)))


@cache
def variants() -> dict[str, Variant]:
    """Return every kernel variant by name."""
    return _variants()


def measure(name: str, architecture: int) -> Resources:
    """Compile one variant, or take it from Triton's cache, and return its resources."""
    variant = variants()[name]
    return resources(compile_variant(variant, architecture), architecture, variant.warps)


def table(row: Callable[[str, int], Resources] = measure) -> str:
    """Return a Markdown table of all kernels on all architectures."""
    lines = [
        "| kernel | " + " | ".join(f"sm_{a}: registers, shared, programs/SM" for a in ARCHITECTURES) + " | spilled |"
    ]
    lines.append("|---|" + "---|" * (len(ARCHITECTURES) + 1))
    for name in variants():
        found = [row(name, architecture) for architecture in ARCHITECTURES]
        cells = [f"{r.registers}, {r.shared}, {r.programs}" for r in found]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {max(r.spilled for r in found)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    print(table(), file=sys.stdout)
