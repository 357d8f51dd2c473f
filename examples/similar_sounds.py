"""Find the sounds that are most like one of yours.

    byola-fast embed my_sounds/ --normalize --out embeddings.npz
    python examples/similar_sounds.py embeddings.npz QUERY.wav

NumPy compares a query with a million sounds (512-d, 2 GB) in about a second. For many queries, or less memory,
give the same rows, of length 1, to an index:

    index = faiss.index_factory(512, "HNSW32", faiss.METRIC_INNER_PRODUCT); index.add(rows)
    cosines, numbers = index.search(query[None], 10)

    index = usearch.index.Index(ndim=512, metric="ip", dtype="f16"); index.add(np.arange(len(rows)), rows)
    numbers = index.search(query, 10).keys
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import byola_fast

Rows = npt.NDArray[np.float32]


def unit(rows: Rows) -> Rows:
    """Scale rows to length 1: their products are cosines."""
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True).clip(1e-9)


def search(rows: Rows, query: Rows, count: int = 10) -> list[tuple[int, float]]:
    """Return the numbers of the rows nearest to a query, with their cosines, the nearest first."""
    cosines = rows @ query
    nearest = np.argpartition(-cosines, min(count, len(rows) - 1))[:count]
    return [(int(n), float(cosines[n])) for n in nearest[np.argsort(-cosines[nearest])]]


def same_folder(rows: Rows, folders: list[str]) -> float:
    """Return the share of sounds whose nearest neighbour lies in their own folder: how well the search works here."""
    hits, asked = 0, range(0, len(rows), 1 + len(rows) // 500)
    for number in asked:
        (best, _), (second, _) = search(rows, rows[number], 2)
        hits += folders[second if best == number else best] == folders[number]
    return hits / len(asked)


def main(table: str, query: str, count: int = 10) -> list[tuple[str, float]]:
    with np.load(table) as content:
        if "mean" not in content:
            raise SystemExit(f"{table}: expected a table of byola-fast embed --normalize, got one without mean and std")
        names, rows = content["file_names"].tolist(), unit(content["embeddings"])
        mean, std = content["mean"], content["std"]  # of --normalize: the query goes on the same scale
    encoder = byola_fast.load_encoder()  # the one that embedded the table
    with torch.no_grad():
        embedding = encoder(byola_fast.read_audio(query, encoder.sample_rate)).numpy()

    found = [(names[n], cosine) for n, cosine in search(rows, unit((embedding - mean) / std), count)]
    for name, cosine in found:
        print(f"{cosine:6.3f}  {name}")
    share = same_folder(rows, [str(Path(name).parent) for name in names])
    print(f"the nearest neighbour lies in the same folder for {100 * share:.0f} % of the sounds")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2])
