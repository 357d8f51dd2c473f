"""README's chart of speed against common pipelines, drawn as SVG from committed results."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

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
    return _document(y + 6, lines)


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


def _document(height: int, lines: list[str]) -> str:
    style = (
        f"text {{ font-family: system-ui, sans-serif; font-size: 14px; fill: {INK} }} "
        ".title { font-weight: 600 } .name { text-anchor: end } .ours { font-weight: 600 } "
        f".caption {{ font-size: 12px; fill: {FAINT} }}"
    )
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-16 0 {WIDTH + 32} {height + 10}" role="img" '
        f'aria-label="Speed of byola_fast against a loop, torch.compile and torchaudio">\n<style>{style}</style>\n'
        f'<rect x="-16" width="{WIDTH + 32}" height="{height + 10}" fill="white"/>\n{body}\n</svg>\n'
    )
