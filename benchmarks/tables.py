"""Tables of records: plain text for the terminal, Markdown for docs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.measure import Measured, Record, Results

PRODUCT = "matrix product"  # the contender that measures the CPU's peak
BUSY = 0.1  # share of the CPU taken by other processes above which a run must not be quoted


def terminal_table(found: Measured) -> list[str]:
    """Return a line for each contender of a group."""
    records = list(found.records.values())
    baselines = _baselines(records)
    unit = "us/sample" if records[0].samples > 1 else "us/call"
    head = ["contender", "threads", unit, "IQR", "GB/s", "GFLOP/s", "share of floor"]
    head += [f"x {name}" for name in baselines]
    rows = [
        [
            r.contender,
            str(r.threads),
            number(r.us_per_sample),
            f"{r.iqr_s / r.median_s:.0%}",
            number(r.gb_per_s),
            "" if r.gflop_per_s is None else number(r.gflop_per_s),
            share(r.floor_share),
            *(times(r, name) for name in baselines),
        ]
        for r in records
    ]
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(_pad(cell, w, i) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in [head, *rows]
    ]
    absent = [f"{name} ({threads} threads) cannot run here: {why}" for (name, threads), why in found.missing.items()]
    others = records[0].others_share
    busy = [f"other processes took {others:.0%} of the CPU: do not quote"] if others and others > BUSY else []
    return ["", found.title, *lines, *absent, *busy]


def markdown_table(results: Results, op: str) -> str:
    """Return the table of one op: a row for each of our contenders, a column for each baseline.

    Raises:
        ValueError: the results hold no record of this op.
    """
    records = [r for r in results.records if r.op == op and r.contender.startswith("byola_fast")]
    if not records:
        raise ValueError(f"no record of {op!r}; known are {sorted({r.op for r in results.records})}")
    baselines = _baselines(records)
    with_floor = any(r.floor_share is not None for r in records)
    peaks = {r.threads: r.gflop_per_s for r in results.records if r.op == op and r.contender == PRODUCT}
    floor = next((r.floor for r in records if r.floor), "")
    per_sample = any(r.samples > 1 for r in records)  # one unit for all rows
    head = [
        op,
        "contender",
        "threads",
        *(f"x {name}" for name in baselines),
        *([f"share of {floor}"] * with_floor),
        *(["GFLOP/s, and of a matrix product"] * bool(peaks)),
        "µs per sample" if per_sample else "ms",
    ]
    rows = [
        [
            r.variant,
            r.contender,
            str(r.threads),
            *(times(r, name) for name in baselines),
            *([share(r.floor_share)] * with_floor),
            *([f"{number(r.gflop_per_s or 0)}, {number(peaks.get(r.threads) or 0)}"] * bool(peaks)),
            number(r.us_per_sample if per_sample else r.median_s * 1e3),
        ]
        for r in records
    ]
    lines = [_row(head), _row(["---"] * 3 + ["---:"] * (len(head) - 3)), *map(_row, rows)]
    return "\n".join([*lines, "", caption(results, records[0])])


def caption(results: Results, record: Record) -> str:
    """Return how, where and when a table's figures were measured."""
    name = str(record.machine["gpu"] if record.device == "cuda" else record.machine["cpu"])
    if record.device == "cpu":
        name += f" ({record.machine['instruction_set']}, {record.machine['cores']} cores)"
    versions = f"torch {record.versions['torch']}, Python {record.versions['python']}"
    how = "Ratios of medians over interleaved rounds (x = times as fast as). The last column is context only."
    return f"{how} {name}, {versions}, {results.date}: `{results.command}`."


def number(value: float) -> str:
    """Format a number with about three digits and without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def times(record: Record, baseline: str) -> str:
    return number(record.ratios[baseline]) if baseline in record.ratios else ""


def _baselines(records: Iterable[Record]) -> list[str]:
    fullest_first = sorted(records, key=lambda record: -len(record.ratios))
    return list(dict.fromkeys(name for record in fullest_first for name in record.ratios))


def _pad(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
