"""The stages of ``gpu_check`` that train: ``pretrain`` on a small packed store, in one process and in two.

A CUDA graph must give the losses of plain steps, with the store on the GPU or read by a thread; a resumed run must give
those of an uninterrupted one. Losses agree closely but not bit for bit: a GPU adds some sums in no fixed order, so
rounding differs from run to run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.stages import row
from byola_fast.runtime.distributed import concat_ranks

CLIPS, SECONDS = 600, 1.0
SMALL = {"feature_d": 512, "batch_size": 64, "n_memory": 256}
TINY = {"feature_d": 16, "proj_dim": 32, "batch_size": 4, "n_memory": 8, "threads": 1}
MANY_CLIPS = 8000  # 31 steps of 256 per epoch, so that the draw of an epoch hardly counts
CLOSE = 0.05  # tolerance of losses between 0 and 8, after a few steps with different rounding
ROOT = Path(__file__).resolve().parents[2]


def write_store(folder: Path, clips: int) -> Path:
    """Write a packed store of noise clips; needs no library for audio files."""
    from byola_fast.audio.reading import listing_checksum
    from byola_fast.audio.store_format import PartWriter

    names, samples = [f"{k:05}.wav" for k in range(clips)], round(SECONDS * 16000)
    level = torch.rand(clips, 1) * 3000
    with PartWriter(folder, 0, 1) as writer:
        for wav in (level * torch.randn(clips, samples)).clamp(-32768, 32767).short():
            writer.write(wav.numpy())
        writer.finish(
            part=0,
            parts=1,
            sample_rate=16000,
            files=clips,
            listing_sha256=listing_checksum(names),
            clipped=0,
            names=names,
            offsets=[samples * k for k in range(clips + 1)],
            source_bytes=[0] * clips,
            source_times=[0] * clips,
            broken={},
        )
    return folder


def train(out: Path, **settings: Any) -> list[dict[str, Any]]:
    """Train and return the lines of the log."""
    from byola_fast.training.config import PretrainConfig
    from byola_fast.training.pretrain import pretrain

    pretrain(PretrainConfig(out=str(out), tensorboard=False, **settings))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def trainer(context: Any) -> dict[str, Any]:
    """Compare ``pretrain`` in a graph and resumed with plain steps; time it with its defaults, and its stages."""
    folder = context.out / "trainer"
    shutil.rmtree(folder, ignore_errors=True)
    store = write_store(folder / "store", 12 if context.dry else CLIPS)
    common = {"audio_dir": str(store), "device": context.device, "stats_segments": 8, "log_every": 1}
    common |= TINY if context.dry else SMALL
    plain = common | {"dtype": "float32", "compile": False}
    found: dict[str, Any] = {"losses": {}}

    def losses(name: str, steps: int, **settings: Any) -> list[float]:
        lines = train(folder / name, **(plain | {"steps": steps} | settings))
        found["losses"][name] = [line["loss"] for line in lines]
        context.keep(found)
        return [line["loss"] for line in lines]

    steps = 4 if context.dry else 8
    wanted = losses("plain", steps, cuda_graph=False)
    losses("resumed", steps // 2)
    others = {"resumed": losses("resumed", steps)}
    if not context.skip("training in a CUDA graph, with the store on the GPU or read by a thread"):
        others["graph"] = losses("graph", steps, cuda_graph=True, store_on_gpu=True)
        others["graph, read by a thread"] = losses("thread", steps, cuda_graph=True, store_on_gpu=False)
    for name, found_losses in others.items():
        worst = max(abs(a - b) for a, b in zip(found_losses, wanted, strict=True))
        assert len(found_losses) == steps
        assert worst <= CLOSE, f"{name}: losses {found_losses} differ by {worst} from plain steps' {wanted}"
    if context.skip("speed of the trainer with its defaults"):
        shutil.rmtree(folder)
        return found
    whole: dict[str, Any] = {"batch_size": 256, "feature_d": 2048, "n_memory": 2048, "steps": 300, "log_every": 50}
    whole |= {"audio_dir": str(write_store(folder / "many", MANY_CLIPS))}
    lines = train(folder / "default", **(common | whole))
    found["samples_per_s"] = [line["samples_per_s"] for line in lines]
    context.keep(found)
    train(folder / "profile", **(common | whole | {"steps": 60, "profile": True}))
    found["stages_ms"] = json.loads((folder / "profile" / "profile.json").read_text())["ms"]
    shutil.rmtree(folder)
    message = f"{max(found['samples_per_s']):,.0f} samples/s at B = 256, the whole `pretrain`"
    return found | {"rows": [row("`pretrain`, byola-v1, d = 2048, defaults", message, {})]}


def ranks(context: Any) -> dict[str, Any]:
    """Train in two processes on one GPU over gloo, as NCCL takes one process per GPU; then in one over NCCL."""
    folder = context.out / "ranks"
    shutil.rmtree(folder, ignore_errors=True)
    store = write_store(folder / "store", 12 if context.dry else CLIPS)
    common = {"audio_dir": str(store), "steps": 6, "log_every": 1, "stats_segments": 8, "dtype": "float32"}
    common |= {"compile": False, "cuda_graph": False, "device": "cpu" if context.dry else "cuda:0"}
    common |= TINY if context.dry else SMALL
    runs = {"gloo": 2}
    if not context.skip("two processes on one GPU, SyncBatchNorm, and NCCL"):
        runs |= {"gloo, SyncBatchNorm": 2, "nccl": 1}
    found: dict[str, Any] = {}
    for name, count in runs.items():
        out = folder / name.replace(", ", "-")
        settings = common | {"sync_batchnorm": "Sync" in name}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command += ["-m", "benchmarks.gpu.trainer", name.partition(",")[0], str(out), json.dumps(settings)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        lines = (out / "log.jsonl").read_text().splitlines()
        found[name] = [json.loads(line)["loss"] for line in lines]
        assert len(found[name]) == 6
        context.keep(found)
    shutil.rmtree(folder)
    return found


def main(backend: str, out: str, settings: str) -> None:
    """Run one of several ranks on a shared device: gather, reduce and train."""
    config = json.loads(settings)
    device = torch.device(config["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(f"cpu:gloo,cuda:{backend}" if device.type == "cuda" else backend)
    x = torch.arange(6.0, device=device)
    assert torch.equal(concat_ranks(x)[-6:], x)
    torch.distributed.all_reduce(x)
    assert float(x[1]) == torch.distributed.get_world_size()
    train(Path(out), **config)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
