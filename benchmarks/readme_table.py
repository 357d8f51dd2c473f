"""Regenerate the tables of README.md and docs from stored results: ``python -m benchmarks.readme_table [--check]``.

The table of op OP in ``benchmarks/results/FILE.json``, for example ``cpu/two_views``, stands between the markers ``<!--
benchmarks:FILE/OP begin -->`` and ``<!-- benchmarks:FILE/OP end -->``. ``gpu/goals`` is the table of ``gpu_check``,
``gpu/summary`` its headlines; both are a notice if there is no ``gpu.json``. ``quality/summary``, ``quality/study`` and
``quality/ablations`` belong to the study. The charts ``benchmarks/results/speed.svg`` and ``docs/learning.svg`` are
drawn from ``cpu.json`` and from the runs of the study.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import gpu_check
from benchmarks.chart import learning_chart, speed_chart
from benchmarks.measure import read_results
from benchmarks.quality import tables as quality_tables
from benchmarks.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- benchmarks:(\S+) begin -->\n)(.*?)(<!-- benchmarks:\2 end -->)", re.DOTALL)
NOT_MEASURED = "**GPU figures have not been measured yet.**"
GPU = {"goals": gpu_check.table, "summary": gpu_check.summary}
QUALITY = {
    "summary": quality_tables.summary_table,
    "study": quality_tables.study_table,
    "ablations": quality_tables.ablation_table,
    "gpu": quality_tables.gpu_table,
    "gpu_tests": quality_tables.gpu_test_table,
    "corpus": quality_tables.corpus_table,
    "corpus_tests": quality_tables.corpus_test_table,
    "poolings": quality_tables.pooling_table,
}
MARKER = re.compile(r"<!-- benchmarks:")


def regenerate(text: str, results: Path) -> str:
    """Return a page's text with every table regenerated from the files in ``results``.

    Raises:
        ValueError: a marker lacks its partner, or a file has no record of an op.
    """

    def table(match: re.Match[str]) -> str:
        begin, name, _old, end = match.groups()
        stem, _, op = name.partition("/")
        if stem == "gpu":
            return f"{begin}{_gpu_table(results / 'gpu.json', op)}\n{end}"
        if stem == "quality":
            return f"{begin}{QUALITY[op](results / 'quality')}\n{end}"
        return f"{begin}{markdown_table(read_results(results / f'{stem}.json'), op)}\n{end}"

    made, count = BLOCK.subn(table, text)
    if len(MARKER.findall(text)) != 2 * count:
        raise ValueError("a benchmarks marker without its partner; expected pairs of begin and end")
    return made


def _gpu_table(path: Path, op: str) -> str:
    if not path.exists():
        return NOT_MEASURED
    return GPU[op](json.loads(path.read_text(encoding="utf-8")))


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the pages, or with ``--check`` return 1 if one is out of date."""
    parser = argparse.ArgumentParser(description="Regenerate the tables of README and docs from stored results.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page is out of date")
    parser.add_argument("--readme", type=Path, nargs="*", default=[ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of JSON files")
    options = parser.parse_args(arguments)
    outdated = 0
    for page in options.readme:
        old = page.read_text(encoding="utf-8")
        new = regenerate(old, options.results)
        if old == new:
            continue
        if options.check:
            print(f"{page.name} is out of date: run python -m benchmarks.readme_table", file=sys.stderr)
            outdated = 1
        else:
            page.write_text(new, encoding="utf-8")
    charts: dict[Path, Callable[[], str]] = {
        options.results / "speed.svg": lambda: speed_chart(read_results(options.results / "cpu.json")),
        ROOT / "docs" / "learning.svg": lambda: learning_chart(options.results / "quality"),
    }
    for chart, draw in charts.items():
        if not any(chart.name in page.read_text(encoding="utf-8") for page in options.readme):
            continue
        drawn = draw()
        if not options.check:
            chart.write_text(drawn, encoding="utf-8")
        elif not chart.exists() or chart.read_text(encoding="utf-8") != drawn:
            print(f"{chart.name} is out of date: run python -m benchmarks.readme_table", file=sys.stderr)
            outdated = 1
    return outdated


if __name__ == "__main__":
    sys.exit(main())
