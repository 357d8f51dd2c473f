"""Charts drawn as SVG from committed results: speed against common pipelines, and accuracy over training steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from statistics import fmean

from benchmarks.measure import Record, Results

WIDTH, LEFT, RIGHT, BAR, GAP, GROUP = 820, 260, 120, 22, 6, 34  # pixels
OURS, THEIRS, INK, FAINT = "#1f5fa8", "#b9c4d0", "#1a1a1a", "#6b7280"
NAMES = {
    "loop": "sample-by-sample loop",
    "compiled": "torch.compile of a batched version",
    "torchaudio": "torchaudio",
    "byola_fast": "byola_fast",
}
GROUPS = [  # title, op, start of the variant, baseline, contenders
    ("Two views, bilinear", "two_views", "bilinear, B = 256", "loop", ("loop", "compiled", "byola_fast")),
    ("Two views, bicubic", "two_views", "bicubic, B = 256", "loop", ("loop", "compiled", "byola_fast")),
    ("Waveform to log-mel", "frontend", "B = 256", "torchaudio", ("torchaudio", "byola_fast")),
]

CURVES = {  # runs of the study: title and colour
    "simclr-short": ("SimCLR's loss, segments of 0.31 s", "#1f5fa8"),
    "byol-short": ("BYOL-A, segments of 0.31 s", "#b3541e"),
    "byol-v1": ("BYOL-A, segments of 0.95 s", "#1c8a5a"),
}
PLOT = (50, 560, 20, 260)  # left, right, top, bottom
STEPS, ACCURACY = (0, 1000), (54, 62)  # of the axes


def speed_chart(results: Results) -> str:
    """Return the SVG of speeds on one CPU thread, each group relative to its first bar.

    Raises:
        ValueError: a record is missing.
    """
    groups = [(title, list(_bars(results, op, variant, base, names))) for title, op, variant, base, names in GROUPS]
    largest = max(times for _title, bars in groups for _name, times in bars)
    record = _record(results, "two_views", "bilinear, B = 256", "byola_fast")
    lines, y = [], 34
    for title, bars in groups:
        lines.append(f'<text x="0" y="{y}" class="title">{escape(title)}</text>')
        y += 12
        for name, times in bars:
            width = max(2.0, times / largest * (WIDTH - LEFT - RIGHT))
            colour = OURS if name == "byola_fast" else THEIRS
            middle = y + BAR * 0.7
            lines.append(f'<text x="{LEFT - 10}" y="{middle:.0f}" class="name">{escape(NAMES[name])}</text>')
            lines.append(f'<rect x="{LEFT}" y="{y}" width="{width:.0f}" height="{BAR}" rx="3" fill="{colour}"/>')
            kind = "ours" if name == "byola_fast" else "theirs"
            lines.append(f'<text x="{LEFT + width + 8:.0f}" y="{middle:.0f}" class="{kind}">{times:.1f} x</text>')
            y += BAR + GAP
        y += GROUP - GAP
    cpu = f"{record.machine['cpu']} ({record.machine['instruction_set']}), torch {record.versions['torch']}"
    caption = escape(f"Times as fast; 256 samples of 64 x 96, float32, one CPU thread, {cpu}")
    lines.append(f'<text x="0" y="{y - 8}" class="caption">{caption}</text>')
    return _document(y + 6, lines, "Speed of byola_fast against a loop, torch.compile and torchaudio")


def learning_chart(folder: Path) -> str:
    """Return the SVG of the probe's accuracy over training steps, the mean over tasks and seeds.

    Raises:
        ValueError: a run of ``CURVES`` is missing.
    """
    left, right, top, bottom = PLOT

    def place(step: float, value: float) -> tuple[float, float]:
        across, up = (step - STEPS[0]) / (STEPS[1] - STEPS[0]), (value - ACCURACY[0]) / (ACCURACY[1] - ACCURACY[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    lines = []
    for mark in range(ACCURACY[0], ACCURACY[1] + 1, 2):
        _, y = place(0, mark)
        lines.append(f'<path d="M{left} {y:.0f}H{right}" stroke="#dfe4ea"/>')
        lines.append(f'<text x="{left - 8}" y="{y + 5:.0f}" class="name">{mark}</text>')
    for step in range(0, STEPS[1] + 1, 200):
        x, _ = place(step, ACCURACY[0])
        lines.append(f'<text x="{x:.0f}" y="{bottom + 20}" text-anchor="middle">{step}</text>')
    for name, (title, colour) in CURVES.items():
        points = list(_curve(folder, name))
        places = [place(step, value) for step, value in points]
        path = "L".join(f"{x:.0f} {y:.0f}" for x, y in places)
        lines.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (step, value) in zip(places, points, strict=True):
            told = f"<title>{escape(title)}, {step} steps: {value:.1f} %</title>"
            lines.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4" fill="{colour}">{told}</circle>')
        x, y = places[-1]
        lines.append(f'<text x="{x + 10:.0f}" y="{y + 5:.0f}" style="fill: {colour}">{escape(title)}</text>')
    caption = "Accuracy of the probe in %, mean over four tasks and the seeds, over steps of 256 segments"
    lines.append(f'<text x="0" y="{bottom + 48}" class="caption">{caption}</text>')
    return _document(bottom + 56, lines, "Accuracy of the probe over training steps")


def _curve(folder: Path, name: str) -> Iterator[tuple[int, float]]:
    """Yield steps and mean accuracy of a run, where more than half of its seeds have a point."""
    runs = [json.loads(path.read_text(encoding="utf-8"))["curve"] for path in sorted(folder.glob(f"{name}-[0-9].json"))]
    if not runs:
        raise ValueError(f"no record of {name} in {folder}")
    found: dict[int, list[float]] = {}
    for point in (point for curve in runs for point in curve):
        found.setdefault(point["step"], []).append(point["mean"])
    yield from sorted((step, fmean(means)) for step, means in found.items() if 2 * len(means) > len(runs))


def _bars(
    results: Results, op: str, variant: str, baseline: str, names: tuple[str, ...]
) -> Iterator[tuple[str, float]]:
    for name in names:
        record = _record(results, op, variant, name)
        yield name, 1.0 if name == baseline else record.ratios[baseline]


def _record(results: Results, op: str, variant: str, contender: str) -> Record:
    for record in results.records:
        if (record.op, record.variant, record.contender, record.threads) == (op, variant, contender, 1):
            return record
    raise ValueError(f"no record of {op}, {variant}, {contender} on one thread")


def _document(height: int, lines: list[str], label: str) -> str:
    style = (
        f"text {{ font-family: system-ui, sans-serif; font-size: 14px; fill: {INK} }} "
        ".title { font-weight: 600 } .name { text-anchor: end } .ours { font-weight: 600 } "
        f".caption {{ font-size: 12px; fill: {FAINT} }}"
    )
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-16 0 {WIDTH + 32} {height + 10}" role="img" '
        f'aria-label="{label}">\n<style>{style}</style>\n'
        f'<rect x="-16" width="{WIDTH + 32}" height="{height + 10}" fill="white"/>\n{body}\n</svg>\n'
    )
