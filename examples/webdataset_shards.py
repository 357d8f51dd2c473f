"""Pre-train on tar shards as WebDataset writes them.

    python examples/webdataset_shards.py SHARDS/

WebDataset reads shards from the front to the back. Here they are indexed once, by the headers alone; a clip is then a
place in a file, so that every epoch has a new order, and a run resumes bit for bit, under torchrun too.
"""

from __future__ import annotations

import hashlib
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

import byola_fast
from byola_fast.audio import audio_duration, read_audio, read_segment

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


class Member(NamedTuple):
    """A file in a shard: its content is ``size`` bytes from ``begin`` on."""

    shard: Path
    name: str
    begin: int
    size: int


def index_shards(folder: str | Path) -> list[Member]:
    """List the audio of all shards; they must not be compressed, as a place in a .tar.gz cannot be sought."""
    found = []
    for shard in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isfile() and member.name.lower().endswith(SUFFIXES):
                    found.append(Member(shard, member.name, member.offset_data, member.size))
    return found


class ShardSource:
    """The audio in a folder of shards."""

    def __init__(self, folder: str | Path, num_samples: int = 15200, seed: int = 0) -> None:
        self.members, self.num_samples, self.seed = index_shards(folder), num_samples, seed
        names = "\0".join(f"{member.shard.name}/{member.name}" for member in self.members)
        self.listing = hashlib.sha256(names.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.members)

    def audio(self, index: int) -> bytes:
        member = self.members[index]
        with open(member.shard, "rb") as shard:
            shard.seek(member.begin)
            return shard.read(member.size)

    def read(self, index: int, epoch: int, draw: int) -> Tensor:
        return read_segment(self.audio(index), self.num_samples, seed=self.seed, epoch=epoch, index=index, draw=draw)

    def seconds(self, index: int) -> float:  # for sample_by="duration"
        return audio_duration(self.audio(index))

    def whole(self, index: int) -> Tensor:  # for byola_fast.audio.pack.pack
        return read_audio(self.audio(index))


def main(folder: str, out: str = "runs/shards", **settings: object) -> byola_fast.PretrainResult:
    config = byola_fast.PretrainConfig(**{"out": out, **settings})  # type: ignore[arg-type]
    return byola_fast.pretrain(config, source=ShardSource(folder, config.num_samples))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
