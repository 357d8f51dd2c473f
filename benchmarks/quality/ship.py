"""Put an encoder of the study into the package: weights, card, and the list of what it heard.

    python -m benchmarks.quality.ship ENCODER RECORD [--heard LIST] [--folder byola_fast/weights]

ENCODER is a file of weights, RECORD the JSON of its run: ``settings``, ``seed``, and a ``curve`` whose last point has
``scores``. LIST has package, version, licences, files and seconds of what it heard; default: the whole corpus.
"""

from __future__ import annotations

import argparse
import csv
import json
import lzma
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.corpus import MANIFEST
from benchmarks.quality.runs import AUDIOSET
from byola_fast.networks.encoder_file import IN_THE_BOX, read_encoder, save_encoder

RESULTS = Path(__file__).parents[1] / "results" / "quality"
TASK_WORDS = {"fsdd": "spoken digits", "drum6": "drums", "env10": "effects", "gm_family": "instruments"}


def whole_corpus() -> list[tuple[str, str, str, str, str]]:
    """Return package, version, licences, number of files and seconds for each package of the corpus's manifest."""
    packages: dict[str, list[Any]] = {}
    here: list[Any] = []
    with lzma.open(MANIFEST, "rt", encoding="utf-8") as file:
        for line in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            if line[0] == "package":
                packages[line[1]] = here = [line[2], line[4], 0, 0.0]
            else:
                here[2] += 1
                here[3] += float(line[2])
    return [(name, version, names, f"{n}", f"{s:.0f}") for name, (version, names, n, s) in sorted(packages.items())]


CARD = """\
# The encoder in the box

{encoder}, {feature_d}-d, {parameters:,} parameters in float16, for sound at 16 kHz. `byola_fast.load_encoder()`,
`byola-fast embed FILES`, `byola-fast eval TASK.csv` and HEAR's `load_model()` take it when no weights are given. Front
end and statistics are in the file. Licence: Apache-2.0, as the package.

## Scores

Accuracy in % on the tasks of the study, in `docs/evaluation.md`: `byola-fast eval TASK.csv --stats task`.

{table}

## Training

`byola-fast pretrain {options}`,
{step:,} steps, seed {seed}.{whitened}

## What it heard

{hours:.1f} hours of {packages} freely licensed packages of Debian 12: speech, music and effects of games, notes, drum
hits. `heard.tsv` lists each package with its version, the licences of its sounds, and the number of files and the
seconds that it heard of them.

It is a small encoder after a short training. It has heard little of nature and of everyday life. Test it on your own
task before you rely on it: `byola-fast eval TASK.csv`.
"""


def card(record: dict[str, Any], heard: list[tuple[str, ...]], parameters: int, whitened: bool) -> str:
    """Return the model card."""
    settings, point = record["settings"], record["curve"][-1]
    random = json.loads((RESULTS / "gpu" / "random.json").read_text(encoding="utf-8"))["scores"]
    rows = {
        "this encoder": {task: point["scores"][task]["accuracy"] for task in AUDIOSET},
        "random weights": {task: sum(one[task]["accuracy"] for one in random) / len(random) for task in AUDIOSET},
        "BYOL-A, AudioSet (5,000 h)": AUDIOSET,
    }
    table = [
        f"| | {' | '.join(TASK_WORDS[task] for task in AUDIOSET)} | mean |",
        "|---|" + "---:|" * len([*AUDIOSET, 0]),
    ]
    for name, scores in rows.items():
        values = [*scores.values(), sum(scores.values()) / len(scores)]
        table.append(f"| {name} | {' | '.join(f'{value:.1f}' for value in values)} |")
    names = ("preset", "objective", "reconstruction", "unit_sec", "batch_size", "lr", "dtype")
    return CARD.format(
        parameters=parameters,
        table="\n".join(table),
        options=" ".join(f"--{name} {settings[name]}" for name in names if name in settings),
        step=point["step"],
        seed=record["seed"],
        hours=sum(float(line[-1]) for line in heard) / 3600,
        packages=len(heard),
        whitened=" Then whitened (`byola-fast whiten`) on segments of the same sound." if whitened else "",
        **{name: settings[name] for name in ("encoder", "feature_d")},
    )


def ship(encoder: Path, record: Path, heard: Path | None, folder: Path) -> None:
    """Write weights, list and card into a folder."""
    network, config, stats = read_encoder(encoder)
    lines: list[tuple[str, ...]] = [*whole_corpus()]
    if heard is not None:
        with open(heard, encoding="utf-8") as file:
            lines = [tuple(line) for line in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)][1:]
    folder.mkdir(parents=True, exist_ok=True)
    save_encoder(folder / IN_THE_BOX.name, network.to(torch.float16), config=config, stats=stats)
    with open(folder / "heard.tsv", "w", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE)
        writer.writerows([("package", "version", "licences", "files", "seconds"), *lines])
    run, parameters = json.loads(record.read_text(encoding="utf-8")), sum(x.numel() for x in network.parameters())
    (folder / "README.md").write_text(
        card(run, lines, parameters, getattr(network, "output", None) is not None), encoding="utf-8"
    )


def main(arguments: list[str] | None = None) -> int:
    """Put an encoder into the package."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.ship", description=__doc__.splitlines()[0])
    parser.add_argument("encoder", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--heard", type=Path, help="list of the packages that it heard; default: the whole corpus")
    parser.add_argument("--folder", type=Path, default=IN_THE_BOX.parent)
    ship(**vars(parser.parse_args(arguments)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
