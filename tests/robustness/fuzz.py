"""Coverage-guided fuzzing of every file reader with Google's atheris (pip install atheris). Run by hand.

    python tests/robustness/fuzz.py --seconds 300 [--only audio checkpoint] [--out fuzz_findings]

Each target gets damaged bytes of one kind of file. It must return a result or raise the documented error. Anything else
(another exception, a crash, a hang of 30 s, more than 4 GiB, code run from a file) is a finding; its input stays in
OUT/TARGET, one for each place in the code. Targets run one after the other, each in a process that restarts after a
crash.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import math
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

MEMORY = 4 << 30  # bytes on top of the imports
HANG_SEC = 30
RUNS_CODE = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "shutil.rmtree", "os.remove")
SECRET = "atheris found nothing here"


class Target(NamedTuple):
    """A kind of file.

    Attributes:
        run: reads the file at this path, checks the result, and returns a word for the outcome.
        allowed: documented errors.
        seeds: contents of small files to start from.
        name: file name.
        wrap: turns fuzzed bytes into the file's bytes.
    """

    run: Callable[[Path], str]
    allowed: Callable[[], tuple[type[Exception], ...]]
    seeds: Callable[[], list[bytes]]
    name: str
    wrap: Callable[[bytes], bytes] = bytes


# audio


def audio_seeds() -> list[bytes]:
    import numpy as np
    import soundfile

    rng, seeds = np.random.default_rng(0), []
    wanted = [
        ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("WAV", "IMA_ADPCM"), ("WAV", "MS_ADPCM"),
        ("WAV", "GSM610"), ("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("W64", "PCM_16"),
        ("FLAC", "PCM_16"), ("FLAC", "PCM_24"),
        ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16"), ("AU", "PCM_16"),
        ("CAF", "PCM_16"), ("CAF", "ALAC_16"), ("VOC", "PCM_16"), ("NIST", "PCM_16"), ("AIFF", "DWVW_16"),
    ]  # fmt: skip
    for number, (kind, subtype) in enumerate(wanted):
        rate = 48000 if subtype == "OPUS" else (16000, 22050, 8000)[number % 3]
        channels = 1 if subtype in ("GSM610", "DWVW_16") else 1 + number % 2
        file = io.BytesIO()
        soundfile.write(file, 0.1 * rng.standard_normal((400, channels)), rate, subtype, format=kind)
        seeds.append(file.getvalue())
    by_ffmpeg = [
        ("ipod", "aac", 44100), ("ipod", "alac", 44100), ("webm", "libopus", 48000), ("adts", "aac", 16000),
        ("matroska", "flac", 8000), ("ogg", "flac", 22050),
    ]  # fmt: skip
    for container, codec, rate in by_ffmpeg:
        seeds.append(_encode_by_ffmpeg(container, codec, rate, 0.1 * rng.standard_normal((1, 1500))))
    return seeds


def _encode_by_ffmpeg(container: str, codec: str, rate: int, wav: Any) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(wav.astype("float32"), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        size = stream.codec_context.frame_size or 1024
        resampler = av.AudioResampler(stream.codec_context.format, "mono", rate, frame_size=size)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            output.mux(stream.encode(part))
    return file.getvalue()


def read_audio_file(path: Path) -> str:
    import torch

    from byola_fast.audio import reading, segments

    way = zlib.crc32(path.read_bytes()) % 4
    if way == 0:
        wav = reading.read_audio(path, 16000)
    elif way == 1:
        wav = reading.read_audio(path, 8000, start_sec=0.01, duration_sec=0.02)
    elif way == 2:
        wav = torch.cat(list(reading.read_blocks(path, 16000, block_sec=0.01)))
    else:
        assert reading.audio_duration(path) > 0
        wav = segments.SegmentFolder([path], unit_sec=0.02).read(0, 0)
        assert len(wav) == 320
    assert wav.dim() == 1
    assert len(wav)
    assert wav.isfinite().all()
    return f"read {way}"


# the packed store


def header_seeds() -> list[bytes]:
    import numpy as np

    from byola_fast.audio.store_format import PartWriter

    with tempfile.TemporaryDirectory() as folder, PartWriter(Path(folder), 0, 1) as writer:
        writer.write(np.arange(300, dtype=np.int16))
        writer.finish(
            part=0, parts=1, sample_rate=16000, files=2, listing_sha256="0" * 64, clipped=0, names=["a.wav", "é.wav"],
            offsets=[0, 300, 300], source_bytes=[10, 0], source_times=[1, 0], broken={"é.wav": "empty file (0 bytes)"},
        )  # fmt: skip
        return [Path(folder, "part-00000-of-00001.json").read_bytes().partition(b"\n")[2]]


def with_checksum(content: bytes) -> bytes:
    """Prepend the checksum line of a header; without it the reader looks no further."""
    import hashlib

    if zlib.crc32(content) % 16 == 0:
        return content
    return f'{{"header_sha256": "{hashlib.sha256(content).hexdigest()}",\n'.encode() + content


def read_store(path: Path) -> str:
    from byola_fast.audio.store import SegmentStore

    folder = path.parent
    data = next((json.loads(path.read_bytes()).get("data", "") for _ in [0] if zlib.crc32(path.read_bytes()) % 2), "")
    if isinstance(data, str) and data.endswith(".int16") and "/" not in data and "\0" not in data and len(data) < 200:
        (folder / data).write_bytes(bytes(600))
    try:
        store = SegmentStore(folder, unit_sec=0.01)
        clips = store.readable.nonzero().flatten().tolist()[:3]
        assert store.gather(clips, 0).shape == (len(clips), store.num_samples)
        store.to_device("cpu").gather(clips, 0)
    finally:
        for other in folder.glob("*.int16"):
            other.unlink()
    return "opened"


def read_store_or_json(path: Path) -> str:
    try:
        return read_store(path)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, AttributeError):
        from byola_fast.audio.store_format import read_header

        read_header(path)
        return "opened"


# texts


def task_seeds() -> list[bytes]:
    rows = [f'a{k}.wav,"{"xy"[k % 2]},z",{("train", "valid", "test")[k % 3]}' for k in range(9)]
    folds = [f"a{k}.wav,{'xy'[k % 2]},{k % 4}" for k in range(9)]
    texts = ["\n".join(["file_name,label,split", *rows]), "\r\n".join(["fold,label,file_name,fold2", *folds])]
    return [text.encode() for text in [*texts, "\n".join(["file_name,label,fold", *folds])]]


def read_task_file(path: Path) -> str:
    from byola_fast.evaluation.tasks import absent_classes, read_task, rounds

    task, _ = read_task(path, keep_going=bool(zlib.crc32(path.read_bytes()) % 2))
    assert len(task.file_names) == len(task.labels) == len(task.splits)
    for one in rounds(task, 0):
        assert one.test
        assert set(one.train) | set(one.valid) | set(one.test) <= set(range(len(task.splits)))
    absent_classes(task)
    return "read"


def results_seeds() -> list[bytes]:
    from byola_fast.evaluation.report import COLUMNS

    return [",".join(COLUMNS).encode() + b"\n", b"", b'a,"b\nc",d\n']


def read_results(path: Path) -> str:
    from byola_fast.evaluation.report import append_result, check_results

    check_results(path)
    append_result(path, {"task": "t"})
    check_results(path)
    return "appended"


def stats_seeds() -> list[bytes]:
    from byola_fast import LogMel
    from byola_fast.spectrograms.corpus_statistics import Stats, write_stats

    with tempfile.TemporaryDirectory() as folder:
        write_stats(Path(folder, "stats.json"), Stats(-7.1, 4.2, 100), LogMel(), 0.95)
        return [Path(folder, "stats.json").read_bytes()]


def read_stats_file(path: Path) -> str:
    from byola_fast import LogMel
    from byola_fast.spectrograms.corpus_statistics import read_stats

    stats = read_stats(path, LogMel())
    assert math.isfinite(stats.mean + stats.std)
    return "read"


def list_seeds() -> list[bytes]:
    content = {"clips": {"a.wav": [0, 2, 10, 99], "b.wav": [2, 1, 10, 99]}, "broken": {"c.wav": "empty"}}
    content |= {"settings": {}, "width": 3}
    return [json.dumps(content).encode()]


def read_list(path: Path) -> str:
    """Read the list of finished clips of a stopped embed run, and write its table."""
    from byola_fast.embedding import tables, unfinished

    path.with_suffix(".f32").write_bytes(bytes(36))
    unfinished.fingerprint = lambda _path: (10, 99)
    done = unfinished.Unfinished(path.parent, {}, 0)
    clips = done.clips({"a.wav": Path("a.wav"), "b.wav": Path("b.wav")})
    done.broken()
    if not clips:
        return "empty"
    out = path.parent / f"table{tables.TABLE_FORMATS[zlib.crc32(path.read_bytes()) % 3]}"
    tables.write_table(out, list(clips.items()), first_ms=0.0, period_ms=80.0)
    return f"written to {out.suffix}"


def log_seeds() -> list[bytes]:
    lines = [{"step": k, "epoch": 0, "loss": 2.5, "spread": 0.5, "lr": 3e-4, "samples_per_sec": 9.0} for k in range(5)]
    return ["".join(json.dumps(line) + "\n" for line in lines).encode()]


def read_log(path: Path) -> str:
    from byola_fast.training.config import PretrainConfig
    from byola_fast.training.run_folder import RunFolder

    run = RunFolder(path.parent)
    try:
        run.begin(3, PretrainConfig(audio_dir=".", tensorboard=False))
        run.log({"step": 4})
        for line in path.read_text(encoding="utf-8").splitlines():
            assert json.loads(line)["step"] <= 4
    finally:
        run.close()
    return f"resumed with {min(len(run.lines), 3)} lines"


# weights


def tiny_encoder() -> Any:
    import torch

    from byola_fast import AudioNTT2020

    torch.manual_seed(0)
    return AudioNTT2020(n_mels=8, d=4)


def checkpoint_seeds(suffix: str = ".pth") -> list[bytes]:
    import torch

    from byola_fast import LogMel
    from byola_fast.networks.encoder_file import describe_encoder, save_encoder

    encoder, seeds = tiny_encoder(), []
    config = describe_encoder(encoder, LogMel(n_mels=8), unit_sec=0.95)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{suffix}")
        save_encoder(path, encoder, config=config, stats=(-7.1, 4.2))
        seeds.append(path.read_bytes())
        if suffix == ".pth":
            old = io.BytesIO()
            torch.save(encoder.state_dict(), old, _use_new_zipfile_serialization=False)
            seeds.append(old.getvalue())
    return seeds


class Malicious:
    def __reduce__(self) -> Any:
        return os.system, (f"echo {SECRET}",)


def pickle_seeds() -> list[bytes]:
    seeds = []
    for content in checkpoint_seeds()[:1]:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            seeds.append(next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")))
    return [*seeds, pickle.dumps({"state_dict": Malicious()}, protocol=2)]


def with_records(content: bytes) -> bytes:
    """Return torch's archive around a fuzzed pickle, with checksums and tables that match it."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_first_checkpoint())) as old, zipfile.ZipFile(file, "w") as new:
        for record in old.infolist():
            new.writestr(record.filename, content if record.filename.endswith("data.pkl") else old.read(record))
    return file.getvalue()


_cache: list[bytes] = []


def _first_checkpoint() -> bytes:
    if not _cache:
        _cache.extend(checkpoint_seeds()[:1])
    return _cache[0]


def read_weights(path: Path) -> str:
    import torch

    from byola_fast import load_encoder
    from byola_fast.networks.encoder_file import load_encoder_weights

    if zlib.crc32(path.read_bytes()) % 2:
        encoder = tiny_encoder()
        load_encoder_weights(encoder, path)
        return "loaded into an encoder"
    embedder = load_encoder(path)
    assert embedder(torch.zeros(1, 4000)).shape == (1, embedder.feature_d)
    return "loaded"


def run_seeds() -> list[bytes]:
    import torch

    from byola_fast.training.config import PretrainConfig

    content = {"model": {}, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "augment": {}, "rng": []}
    more = {"config": vars(PretrainConfig(audio_dir=".")), "step": 3, "epoch": 0, "clips": 3, "stats": (-7.0, 4.0)}
    file = io.BytesIO()
    torch.save(content | more, file)
    with zipfile.ZipFile(file) as archive:
        return [next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))]


def open_run(path: Path) -> str:
    """Resume from a run's checkpoint."""
    import torch

    from byola_fast import AudioNTT2020, Augment, make_learner
    from byola_fast.runtime.distributed import World
    from byola_fast.training.config import PretrainConfig
    from byola_fast.training.run_folder import RunFolder, RunState

    run = RunFolder(path.parent)
    try:
        saved = run.open(PretrainConfig(audio_dir="."))
        assert saved is not None
        learner = make_learner("byol", AudioNTT2020(n_mels=8, d=4), proj_size=2, proj_dim=2)
        parameters = [p for p in learner.parameters() if p.requires_grad]
        world = World(0, 1, torch.device("cpu"))
        RunState(world, learner, torch.optim.Adam(parameters), Augment(n_memory=2)).restore(saved)
    finally:
        run.close()
    return "resumed"


def _error(module: str, name: str) -> Callable[[], tuple[type[Exception], ...]]:
    def load() -> tuple[type[Exception], ...]:
        import importlib

        return (getattr(importlib.import_module(f"byola_fast.{module}"), name),)

    return load


def _value_error() -> tuple[type[Exception], ...]:
    return (ValueError,)


CHECKPOINT_ERROR = _error("networks.checkpoint", "CheckpointError")
STORE_ERROR = _error("audio.store_format", "StoreError")
TARGETS = {
    "audio": Target(read_audio_file, _error("audio.reading", "AudioError"), audio_seeds, "a.wav"),
    "store": Target(
        read_store_or_json, STORE_ERROR, header_seeds, "part-00000-of-00001.json", with_checksum
    ),
    "task": Target(read_task_file, _error("evaluation.tasks", "TaskError"), task_seeds, "task.csv"),
    "results": Target(read_results, _value_error, results_seeds, "results.csv"),
    "stats": Target(read_stats_file, _value_error, stats_seeds, "stats.json"),
    "list": Target(read_list, _value_error, list_seeds, "0-0.json"),
    "log": Target(read_log, CHECKPOINT_ERROR, log_seeds, "log.jsonl"),
    "checkpoint": Target(read_weights, CHECKPOINT_ERROR, checkpoint_seeds, "a.pth"),
    "pickle": Target(read_weights, CHECKPOINT_ERROR, pickle_seeds, "a.pth", with_records),
    "run": Target(open_run, _value_error, run_seeds, "checkpoint.pt", with_records),
    "safetensors": Target(
        read_weights, CHECKPOINT_ERROR, lambda: checkpoint_seeds(".safetensors"), "a.safetensors"
    ),
}  # fmt: skip


def fuzz(name: str, seconds: int, out: Path) -> None:
    """Fuzz one target in this process for some seconds; counts go to a file as they grow."""
    import atheris

    target = TARGETS[name]
    with atheris.instrument_imports(include=["byola_fast", "soundfile", "json", "csv", "safetensors"]):
        target.allowed()
        import byola_fast.embedding.embed_files
        import byola_fast.training.pretrain  # noqa: F401
    import torch

    torch.set_num_threads(1)
    allowed, counts = target.allowed(), collections.Counter()
    work = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    corpus = work / "corpus"
    corpus.mkdir()
    seeds = target.seeds()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
        target.wrap(seed)
    inside = False

    def watch(event: str, _args: Any) -> None:
        if inside and event in RUNS_CODE[:-2]:
            raise SystemError(f"a file ran code: {event}")

    sys.addaudithook(watch)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))

    def keep(outcome: str, path: Path, error: BaseException) -> None:
        found = out / name / outcome.replace(" ", "_")
        if not found.exists():
            found.write_bytes(path.read_bytes())
            found.with_name(f"{found.name}.txt").write_text("".join(traceback.format_exception(error)))

    def one(content: bytes) -> None:
        nonlocal inside
        folder = work / "fuzzed"
        folder.mkdir(exist_ok=True)
        path = folder / target.name
        path.write_bytes(target.wrap(content))
        inside = True
        try:
            outcome = target.run(path)
        except allowed as error:
            named = any(part in str(error) for part in (path.name, path.parent.name))
            outcome = type(error).__name__ if named else f"FINDING {type(error).__name__} without a file name"
            if not named:
                keep(outcome, path, error)
        except BaseException as error:
            inside = False
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/byola_fast/" in frame.filename]
            where = f"{Path(frames[-1].filename).stem}:{frames[-1].lineno}" if frames else "here"
            outcome = f"FINDING {type(error).__name__} at {where}"
            keep(outcome, path, error)
        inside = False
        for other in folder.iterdir():
            if other.is_dir():
                shutil.rmtree(other)
            else:
                other.unlink()
        counts[outcome] += 1
        if sum(counts.values()) % 20 == 0 or counts[outcome] == 1:
            (out / name / f"counts-{os.getpid()}.json").write_text(json.dumps(counts))

    options = [
        f"-max_total_time={seconds}",
        f"-timeout={HANG_SEC}",
        "-rss_limit_mb=0",
        f"-artifact_prefix={out / name}/",
    ]
    atheris.Setup(
        [sys.argv[0], *options, f"-max_len={max(4096, 2 * max(map(len, seeds)))}", "-verbosity=0", str(corpus)], one
    )
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz every file reader.")
    parser.add_argument("--seconds", type=int, default=300, help="for each target")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--out", type=Path, default=Path("fuzz_findings"), help="folder for failing inputs")
    parser.add_argument("--in_process", action="store_true", help="fuzz one target in this process")
    options = parser.parse_args()
    out = options.out.absolute()
    if options.in_process:
        fuzz(options.only[0], options.seconds, out)
        return 0
    failed = False
    for name in options.only:
        folder, end = out / name, time.monotonic() + options.seconds
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("counts-*.json"):
            old.unlink()
        crashes = 0
        while (left := int(end - time.monotonic())) > 0:
            command = [sys.executable, __file__, "--in_process", "--only", name, "--seconds", str(left)]
            with open(folder / "log.txt", "ab") as log:
                done = subprocess.run([*command, "--out", str(out)], stdout=log, stderr=log)
            crashes += done.returncode != 0
            if done.returncode and crashes > 20:
                break
        for leftover in Path("/dev/shm").glob(f"fuzz-{name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        counts: collections.Counter[str] = collections.Counter()
        for path in folder.glob("counts-*.json"):
            counts.update(json.loads(path.read_text()))
        artifacts = [path.name for kind in ("crash", "timeout", "oom") for path in folder.glob(f"{kind}-*")]
        print(f"{name}: {sum(counts.values())} inputs, {crashes} crashes {' '.join(artifacts)}")
        for outcome, count in counts.most_common():
            print(f"  {count:9d}  {outcome}")
        sys.stdout.flush()
        failed |= bool(crashes) or any(outcome.startswith("FINDING") for outcome in counts)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
