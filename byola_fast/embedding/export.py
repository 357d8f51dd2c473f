"""Export an encoder, from waveform to embedding, as ONNX or a torch.export program that runs without this package."""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from byola_fast.embedding.embed_files import open_encoder
from byola_fast.embedding.embedder import Embedder
from byola_fast.networks.checkpoint import write_checked

logger = logging.getLogger("byola_fast")

EXPORT_FORMATS = (".onnx", ".pt2")
MIN_FRAMES = 2  # frame-level embeddings; torch.export specialises a dynamic size of 1
OPSET = 18
LARGEST_DIFFERENCE = 1e-4  # 1e-6 is usual


@dataclass
class ExportConfig:
    """Settings of an export.

    Attributes:
        weights: file of an encoder: encoder.pth, encoder.safetensors, checkpoint.pt, a run's folder, or published
            weights; by default those that come with the package.
        out: file to write; its suffix is the format: .onnx (ONNX Runtime and others) or .pt2 (torch.export).
        frames: export frame-level embeddings, (B, T', d), instead of one per clip, (B, d).
        stats: JSON file from "byola-fast stats", for weights without statistics.
        encoder: class of the network, as package.module:Class, for weights of a network of your own.
    """

    weights: str | None = None
    out: str = "encoder.onnx"
    frames: bool = False
    stats: str | None = None
    encoder: str | None = None


def export_encoder(embedder: Embedder, path: str | Path, *, frames: bool = False) -> Path:
    """Write a network from waveform to embedding, with front end and statistics, for other runtimes.

    Args:
        embedder: from ``load_encoder``; float32, on the CPU.
        path: ``.onnx`` for ONNX (input ``wav``, output ``embedding``), ``.pt2`` for ``torch.export.load``.
        frames: the output is frame-level, ``(B, T', d)``, instead of ``(B, d)``.

    Shape:
        Input ``(B, samples)`` float32, mono, at the encoder's ``sample_rate``, for any B and at least
        ``shortest_export(embedder)`` samples; the caller pads shorter sound with zeros.

    Returns:
        The path. The file also holds sample_rate, feature_d, frame_period_ms and min_samples: in ONNX as metadata, in
        ``.pt2`` as the extra file ``byola_fast.json``.

    Raises:
        ValueError: another suffix; an embedder in training mode, in half precision or not on the CPU. ImportError: ONNX
        needs onnxscript. CheckpointError: the file cannot be written; an older file stays.

    Numerics:
        The reference's plain PyTorch operations: equal to ``embedder`` within 1e-5 of the embedding's largest value.

    Source:
        BYOL-A, arXiv:2103.06695 and arXiv:2204.07402.
    """
    path = Path(path)
    if path.suffix not in EXPORT_FORMATS:
        raise ValueError(f"out: expected a name ending in {' or '.join(EXPORT_FORMATS)}, got {path}")
    weight = next(embedder.encoder.parameters())
    if embedder.training or weight.dtype != torch.float32 or weight.device.type != "cpu":
        mode = "training" if embedder.training else "eval"
        raise ValueError(
            f"embedder: expected eval mode, float32, on the CPU, got {mode}, {weight.dtype}, {weight.device}"
        )
    if path.suffix == ".onnx" and find_spec("onnxscript") is None:
        raise ImportError("ONNX needs onnxscript: pip install onnx onnxscript")
    shortest = shortest_export(embedder)
    about: dict[str, Any] = {"sample_rate": embedder.sample_rate, "feature_d": embedder.feature_d}
    if embedder.has_frames:
        about["frame_period_ms"] = embedder.frame_period_ms
    about["min_samples"] = shortest
    network = _Face(embedder, frames).eval()
    example = torch.zeros(2, max(embedder.sample_rate, shortest + 1), dtype=torch.float32, device="cpu")
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("samples", min=shortest)},)
    # whatever surrounds the call is not for the file: gradients, autocast, another default device
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from inside the exporter
        program = torch.export.export(network, (example,), dynamic_shapes=sizes, strict=False)
        content = _as_pt2(program, about) if path.suffix == ".pt2" else _as_onnx(program, about)
    write_checked(path, lambda file: file.write(content))
    return path


def shortest_export(embedder: Embedder) -> int:
    """Return the minimum number of samples of an exported file: two frame-level embeddings.

    >>> from byola_fast import AudioNTT2020
    >>> shortest_export(Embedder(AudioNTT2020(d=32), stats=(-7.1, 4.2)))
    2400
    """
    if not embedder.has_frames:
        return embedder.min_samples
    frames = MIN_FRAMES * embedder.frame_stride
    return max((frames - 1) * embedder.to_lms.hop_length, embedder.min_samples)


def run_export(config: ExportConfig) -> Path:
    """Export an encoder from a file of weights; compare with onnxruntime if that is installed.

    Raises:
        ValueError: onnxruntime gives other embeddings; the file stays. Otherwise as ``export_encoder``.
    """
    embedder = open_encoder(config.weights, config.stats, "cpu", encoder=config.encoder)
    path = export_encoder(embedder, config.out, frames=config.frames)
    if path.suffix == ".onnx" and find_spec("onnxruntime") is not None:
        difference = _difference(embedder, path, config.frames)
        if not difference <= LARGEST_DIFFERENCE:
            raise ValueError(
                f"{path}: onnxruntime differs from this encoder by {difference:.1g} of the largest value, expected at "
                f"most {LARGEST_DIFFERENCE:g}; do not use the file"
            )
        logger.info("%s: within %.1g of this encoder in onnxruntime", path, difference)
    return path


class _Face(nn.Module):
    """One tensor in, one tensor out."""

    def __init__(self, embedder: Embedder, frames: bool) -> None:
        super().__init__()
        self.embedder, self.frames = embedder, frames

    def forward(self, wav: Tensor) -> Tensor:
        answer: Any = self.embedder(wav, frames=self.frames)
        return answer.frames if self.frames else answer


def _as_pt2(program: torch.export.ExportedProgram, about: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"byola_fast.json": json.dumps(about)})
    return file.getvalue()


def _as_onnx(program: torch.export.ExportedProgram, about: dict[str, Any]) -> bytes:
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        names: Any = {"input_names": ["wav"], "output_names": ["embedding"]}
        made: Any = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, **names)
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
    made.model.metadata_props.update({name: str(value) for name, value in about.items()})
    proto = made.model_proto
    _name_sizes(proto.graph)
    content: bytes = proto.SerializeToString()
    return content


def _name_sizes(graph: Any) -> None:
    """Rename the input sizes to batch and samples; the exporter numbers them."""
    sizes = [size.dim_param for size in graph.input[0].type.tensor_type.shape.dim]
    names = dict(zip(sizes, ("batch", "samples"), strict=True))
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.dim_param)


def _difference(embedder: Embedder, path: Path, frames: bool) -> float:
    """Return the largest difference to onnxruntime, relative to the largest value, over two input sizes; may be NaN."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    face, differences = _Face(embedder, frames), []
    for batch, samples in ((1, shortest_export(embedder)), (3, 2 * embedder.sample_rate + 7)):
        wav = torch.randn(batch, samples, dtype=torch.float32, device="cpu") / 8
        expected = face(wav)
        other = torch.from_numpy(session.run(None, {"wav": wav.numpy()})[0])
        differences.append((expected - other).abs().max() / expected.abs().max().clamp_min(1e-9))
    return float(torch.stack(differences).max())
