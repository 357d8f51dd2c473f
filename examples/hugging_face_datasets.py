"""Pre-train on a data set of Hugging Face's datasets, as Parquet files on the disk.

    python examples/hugging_face_datasets.py "my_data/*.parquet"

The audio column stays encoded: our reader decodes the little that a segment needs, and resamples it. The run resumes
bit for bit, and torchrun starts it on several GPUs as it is.
"""

from __future__ import annotations

import hashlib
import sys

import datasets
from torch import Tensor

import byola_fast
from byola_fast.audio import audio_duration, read_audio, read_segment


class DatasetSource:
    """The audio column of a data set.

    Args:
        dataset: with random access: a ``datasets.Dataset``, not an iterable one.
        column: of audio.
        num_samples: length of a segment, at 16 kHz.
        seed: of the segments.
    """

    def __init__(
        self, dataset: datasets.Dataset, column: str = "audio", num_samples: int = 15200, seed: int = 0
    ) -> None:
        self.clips = dataset.select_columns(column).cast_column(column, datasets.Audio(decode=False))
        self.column, self.num_samples, self.seed = column, num_samples, seed
        names = self.clips.flatten()[f"{column}.path"]
        self.listing = hashlib.sha256("\0".join(map(str, names)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.clips)

    def audio(self, index: int) -> bytes | str:
        clip = self.clips[index][self.column]
        return clip["path"] if clip["bytes"] is None else clip["bytes"]

    def read(self, index: int, epoch: int, draw: int) -> Tensor:
        return read_segment(self.audio(index), self.num_samples, seed=self.seed, epoch=epoch, index=index, draw=draw)

    def seconds(self, index: int) -> float:  # for sample_by="duration"
        return audio_duration(self.audio(index))

    def whole(self, index: int) -> Tensor:  # for byola_fast.audio.pack.pack, if an epoch takes long to decode
        return read_audio(self.audio(index))


def main(files: str, out: str = "runs/parquet", **settings: object) -> byola_fast.PretrainResult:
    dataset = datasets.load_dataset("parquet", data_files=files, split="train")
    config = byola_fast.PretrainConfig(**{"out": out, **settings})  # type: ignore[arg-type]
    source = DatasetSource(dataset, num_samples=config.num_samples, seed=config.seed)
    result = byola_fast.pretrain(config, source=source)
    print(f"{result.steps} steps over {len(source)} clips, loss {result.loss:.3f}")
    return result


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
