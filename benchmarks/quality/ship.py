"""Put an encoder of the study into the package: weights, card, and the list of what it heard.

    python -m benchmarks.quality.ship ENCODER RECORD [--heard LIST] [--scores JSON] [--folder FOLDER]

ENCODER is a file of weights, RECORD the JSON of its run: ``settings``, ``seed``, and a ``curve`` whose last point has
``scores``. LIST has package, version, licences, files and seconds of what it heard; default: the whole corpus. JSON has
rows of the table: name, and accuracy for each task, measured with the shipped file; default: the scores of RECORD.
"""

from __future__ import annotations

import argparse
import csv
import json
import lzma
import textwrap
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

The last two rows have `--stats task`. This is one seed; others will differ. It was chosen by ridge regression on
training and validation parts, before its test. Digits have no validation part: there the choice saw the tested clips.

## Training

    {command}
{whitened}
## What it heard

{hours:.1f} hours of {packages} freely licensed packages of Debian 12: speech, music and effects of games, notes, drum
hits. `heard.tsv` lists each package with its version, the licences of its sounds, and the number of files and the
seconds that it heard of them.

It is a small encoder after a short training. It has heard little of nature and of everyday life. Test it on your own
task before you rely on it: `byola-fast eval TASK.csv`.
"""


WHITENED = """
Then whitened as by `byola-fast whiten`, on 4,096 segments of 0.95 s of what it heard, and of no clip of a task.
"""


def card(
    record: dict[str, Any],
    heard: list[tuple[str, ...]],
    parameters: int,
    whitened: bool,
    scores: dict[str, dict[str, float]] | None = None,
) -> str:
    """Return the model card."""
    settings, point = record["settings"], record["curve"][-1]
    random = json.loads((RESULTS / "gpu" / "random.json").read_text(encoding="utf-8"))["scores"]
    recorded = {"this encoder": {task: point["scores"][task]["accuracy"] for task in AUDIOSET}}
    rows = {
        **(scores or recorded),
        "random weights": {task: sum(one[task]["accuracy"] for one in random) / len(random) for task in AUDIOSET},
        "BYOL-A, AudioSet (5,000 h)": AUDIOSET,
    }
    table = [
        f"| | {' | '.join(TASK_WORDS[task] for task in AUDIOSET)} | mean |",
        "|---|" + "---:|" * len([*AUDIOSET, 0]),
    ]
    for name, found in rows.items():
        values = [*(found[task] for task in AUDIOSET), sum(found.values()) / len(found)]
        table.append(f"| {name} | {' | '.join(f'{value:.1f}' for value in values)} |")
    names: tuple[str, ...] = (
        "preset",
        "encoder",
        "feature_d",
        "objective",
        "reconstruction",
        "unit_sec",
        "batch_size",
        "lr",
    )
    names += ("lr_schedule", "warmup_steps", "steps", "dtype", "seed")
    given = settings | {"steps": point["step"], "seed": record["seed"]}
    options = [f"--{name.replace('_', '-')} {given[name]}" for name in names if name in given]
    command = " ".join(["byola-fast pretrain CORPUS", *options])
    return CARD.format(
        parameters=parameters,
        table="\n".join(table),
        command=" \\\n        ".join(textwrap.wrap(command, 108, break_on_hyphens=False)),
        hours=sum(float(line[-1]) for line in heard) / 3600,
        packages=len(heard),
        whitened=WHITENED if whitened else "",
        **{name: settings[name] for name in ("encoder", "feature_d")},
    )


def ship(encoder: Path, record: Path, heard: Path | None, scores: Path | None, folder: Path) -> None:
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
    measured = None if scores is None else json.loads(scores.read_text(encoding="utf-8"))
    text = card(run, lines, parameters, getattr(network, "output", None) is not None, measured)
    (folder / "README.md").write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Put an encoder into the package."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.ship", description=__doc__.splitlines()[0])
    parser.add_argument("encoder", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--heard", type=Path, help="list of the packages that it heard; default: the whole corpus")
    parser.add_argument("--scores", type=Path, help="rows of scores of the file itself; default: the record's")
    parser.add_argument("--folder", type=Path, default=IN_THE_BOX.parent)
    ship(**vars(parser.parse_args(arguments)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
