"""Embed folders of audio into one file; a killed run resumes, and ranks share the work."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from byola_fast.audio.decoding import decoders
from byola_fast.audio.reading import list_audio_files
from byola_fast.embedding.embedder import Embedder, load_encoder
from byola_fast.embedding.streaming import BATCH_SEC, embed_clips, require_batching
from byola_fast.embedding.tables import TABLE_FORMATS, write_table
from byola_fast.embedding.unfinished import Unfinished
from byola_fast.networks.encoder_file import find_weights
from byola_fast.runtime.device import DTYPES, pick_device, warn_of_slow_bfloat16
from byola_fast.runtime.distributed import join, name_lost_rank
from byola_fast.runtime.files import file_sha256, fingerprint, require_writable
from byola_fast.runtime.progress import Progress
from byola_fast.spectrograms.corpus_statistics import read_stats

logger = logging.getLogger("byola_fast")

CHANGED = "the file changed during the run"
TIMEOUT_MIN = 7 * 24 * 60  # ranks may end far apart


@dataclass
class EmbedConfig:
    """Settings of embedding files or folders.

    Attributes:
        weights: file of an encoder: encoder.pth, encoder.safetensors, checkpoint.pt, a run's folder, or published
            weights; by default those that come with the package.
        paths: audio files, or folders of them; of any rate, channel count and length.
        out: file to write or replace. .npz: arrays file_names and embeddings. .npy: the embeddings, their names beside
            it in OUT.names.csv. .csv: a line for each.
        frames: write frame-level embeddings with their times (every 80 ms with AudioNTT2020, 40 ms with AudioNTT2022)
            instead of one embedding per file.
        normalize: standardise each feature (mean 0, std 1 over all rows), for neighbours, clusters and maps: features
            differ in size, and those alike in all sounds hide those that tell sounds apart. .npz then also has mean and
            std.
        stats: JSON file from "byola-fast stats"; overrides the statistics in the weights.
        dtype: of the encoder: "float32", or "bfloat16", which is faster on hardware that has it.
        encoder: class of the network, as package.module:Class, for weights of a network of your own.
        device: "cpu", "cuda", "cuda:1" and so on, "mps"; "auto" takes a GPU if there is one.
        batch_sec: sound per batch, in seconds; longer files are embedded in pieces.
        workers: processes that decode audio; by default one fewer than there are CPU cores, at most 8.
    """

    weights: str | None = None
    paths: list[str] = field(default_factory=list)
    out: str = "embeddings.npz"
    frames: bool = False
    normalize: bool = False
    stats: str | None = None
    dtype: str = "float32"
    encoder: str | None = None
    device: str = "auto"
    batch_sec: float = BATCH_SEC
    workers: int | None = None


class EmbedResult(NamedTuple):
    """The result of ``run_embed``.

    Attributes:
        out: the file written.
        files: number of files with embeddings.
        rows: number of embeddings.
        feature_d: width of an embedding.
        broken: files without embeddings, with the reason.
        resumed: number of files done by an earlier run.
        speed: seconds of sound embedded per second by this process.
    """

    out: Path
    files: int
    rows: int
    feature_d: int
    broken: dict[str, str]
    resumed: int
    speed: float


def run_embed(config: EmbedConfig) -> EmbedResult | None:
    """Embed files, showing progress; under torchrun, all ranks share the files.

    Finished embeddings go to the folder ``OUT.parts`` at least every 15 seconds. A stopped or killed run resumes when
    it is run again, also with another number of ranks; files that changed meanwhile are embedded again, and broken ones
    tried again. The last step writes ``out``, whole or not at all, in place of an older one, and removes the folder. A
    file that cannot be read, changes during the run, or has an embedding that is not finite is logged and left out.

    Returns:
        The result; None on ranks above 0.

    Raises:
        CheckpointError: the weights cannot be used. FileNotFoundError: no such audio file or folder.
        AudioError: no audio in a folder.
        ValueError: settings out of range; no file can be embedded; ``OUT.parts`` is of other weights or settings, or
            another run is writing there. OSError: ``out`` cannot be written.
        RankError: another process of the run died.
    """
    out = Path(config.out)
    if out.suffix not in TABLE_FORMATS:
        raise ValueError(f"out: expected a name ending in {', '.join(TABLE_FORMATS)}, got {out}")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {config.dtype!r}")
    weights = find_weights(config.weights)
    loaded = fingerprint(weights)
    embedder = open_encoder(weights, config.stats, config.device, encoder=config.encoder)
    embedder.to(DTYPES[config.dtype])
    if embedder.to_lms.window.device.type == "cpu" and config.dtype == "bfloat16":
        warn_of_slow_bfloat16()
    times = {}
    if config.frames:
        hop_ms = 1000 * embedder.to_lms.hop_length / embedder.sample_rate
        times = {"period_ms": embedder.frame_period_ms, "first_ms": (embedder.frame_period_ms - hop_ms) / 2}
    require_batching(0.0, config.batch_sec, config.workers)
    root, files = _name_files(config.paths)
    settings = {
        "weights_sha256": file_sha256(weights),
        "encoder": config.encoder,
        "stats": list(embedder.stats),
        "frames": config.frames,
        "dtype": config.dtype,
        "decoders": decoders(),
        "folder": os.path.abspath(root),
    }
    if fingerprint(weights) != loaded:
        raise ValueError(f"{weights}: changed while it was read; run again")
    require_writable(out)
    kept = f"finished embeddings are kept in {out}.parts; the same command resumes there"
    with (
        join(torch.device("cpu"), TIMEOUT_MIN) as world,
        name_lost_rank(world, lambda: kept),
        ExitStack() as claim,
    ):
        store = Unfinished(Path(f"{out}.parts"), settings, world.rank)

        def claimed() -> dict[str, Path]:
            claim.enter_context(store.claim())
            return files

        files = world.broadcast(claimed)  # one listing for all ranks
        done = store.clips(files)
        todo = [name for name in list(files)[world.rank :: world.size] if name not in done]
        speed = _embed(embedder, files, todo, store, config)
        world.all_max(0)  # a barrier
        if not world.first:
            return None
        clips = store.clips(files)
        reasons = store.broken()
        broken = {name: reasons.get(name, CHANGED) for name in files if name not in clips}
        for name in broken.keys() - reasons.keys():
            logger.warning("skipping %s: %s", files[name], CHANGED)
        if not clips:
            store.clear()
            first = next(iter(files))
            raise ValueError(f"none of {len(files)} files can be embedded: {first}: {broken[first]}")
        ordered = [(name, clips[name]) for name in files if name in clips]
        write_table(out, ordered, normalize=config.normalize, **times)
        store.clear()
    rows = sum(clip.rows for _name, clip in ordered)
    return EmbedResult(out, len(ordered), rows, embedder.feature_d, broken, len(done), speed)


def open_encoder(
    weights: str | Path | None,
    stats: str | None = None,
    device: str = "auto",
    *,
    encoder: str | None = None,
    given: tuple[float, float] | None = None,
) -> Embedder:
    """Load an encoder onto a device; given statistics, or those of a JSON file, override its own."""
    where = pick_device(device)
    given = given if stats is None else read_stats(stats)[:2]
    embedder = load_encoder(weights, encoder=encoder, device=where, stats=given)
    if stats is not None:
        read_stats(stats, embedder.to_lms)  # refuses those of another front end
    return embedder


def _name_files(paths: Sequence[str]) -> tuple[Path, dict[str, Path]]:
    """Return audio files by the names that they are written under, and the folder that these are relative to.

    Names are relative to the only folder given, or as given. A file that is given twice is there once.
    """
    if not paths:
        raise ValueError("paths: expected audio files or a folder of them, got none")
    single = len(paths) == 1 and Path(paths[0]).is_dir()
    root = Path(paths[0]) if single else Path()
    listed = [file for path in paths for file in list_audio_files(path)]
    return root, {(file.relative_to(root) if single else file).as_posix(): file for file in listed}


def _embed(
    embedder: Embedder, files: dict[str, Path], todo: list[str], store: Unfinished, config: EmbedConfig
) -> float:
    """Embed files by name into this rank's parts; return seconds of sound a second."""
    paths = [files[name] for name in todo]
    sources = [fingerprint(path) for path in paths]
    pieces = embed_clips(
        embedder, paths, frames=config.frames, batch_sec=config.batch_sec, workers=config.workers
    )  # fmt: skip
    samples, ended, started = 0, 0, time.monotonic()
    progress: Any = nullcontext() if store.rank else Progress("files", len(todo))
    with progress, closing(pieces), store:
        for piece in pieces:
            name = todo[piece.number]
            if piece.error is not None:
                logger.warning("skipping %s", piece.error)
                store.add_broken(name, piece.error.reason)
            else:
                store.add(name, sources[piece.number], piece.rows.numpy(), piece.last)
            samples += piece.samples
            ended += piece.last
            if not store.rank:
                sound = samples / embedder.sample_rate
                message = (
                    f"{sound / 3600:.2f} h of sound, {sound / (time.monotonic() - started + 1e-9):.0f} x real time"
                )
                progress.show(ended, message, len(todo))
    return samples / embedder.sample_rate / (time.monotonic() - started)
