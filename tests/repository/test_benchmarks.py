"""The machinery of the benchmarks: contenders, the correctness gate, the timer, records and tables."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import byola_fast
from benchmarks import contenders as c
from benchmarks import measure as m
from benchmarks import readme_table
from benchmarks.bench_ema import MODELS
from benchmarks.chart import learning_chart, speed_chart
from benchmarks.tables import markdown_table, terminal_table

ONE = m.Place("cpu", 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pipelines_agree(interpolation: str) -> None:
    x = torch.randn(7, 13, 21)
    params = c.draw(x, step=3)
    exact = torch.stack(c.views_exact(x, params, interpolation))
    found = {
        "loop": c.views_loop(x, c.loop_params(params), interpolation),
        "reference": c.views_reference(x, params, interpolation),
        "byola_fast": byola_fast.augment(x, stats=(0.0, 1.0), seed=c.SEED, step=3, interpolation=interpolation),
    }
    for name, views in found.items():
        error = (torch.stack(list(views)).double() - exact).abs().max().item()
        assert error < m.TOLERANCE, f"{name}: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_compiled_contender_is_one_graph(interpolation: str) -> None:
    x = torch.randn(3, 13, 21)
    params = c.draw(x, step=3)
    compiled = torch.compile(c.views_reference, fullgraph=True, backend="aot_eager")
    expected = c.views_reference(x, params, interpolation)
    torch.testing.assert_close(compiled(x, params, interpolation), expected)


def test_exact_views_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(9, 5, 6)
    params = c.draw(x, step=0)
    whole = torch.stack(c.views_exact(x, params, "bilinear"))
    monkeypatch.setattr(c, "CHUNK", 4)
    torch.testing.assert_close(torch.stack(c.views_exact(x, params, "bilinear")), whole)


def test_view_contenders_pass_the_gate() -> None:
    with_small_cache = pytest.MonkeyPatch()
    with_small_cache.setattr(m, "last_level_cache", lambda device: 1)
    try:
        data = c.Batches(3, "cpu", (9, 11))
    finally:
        with_small_cache.undo()
    assert data.count == 2
    names = ("loop", "reference", "byola_fast", "byola_fast, out=", "copy", "exp + log")
    made = c.view_contenders(data, ONE, "bilinear", names)
    assert m.gate(m.Group("two_views", "small", made, ())) == {}


def test_encoder_and_projector_have_the_published_size() -> None:
    shapes = MODELS["AudioNTT2020 d = 2048 and projector"]
    assert sum(torch.Size(shape).numel() for shape in shapes) == 5_321_856 + 9_449_728


def fake(name: str, run: Callable[[int], object] | None = None, threads: int = 1, **more: object) -> m.Contender:
    def nothing(_k: int) -> Sequence[Tensor]:
        return (torch.zeros(2),)

    made = m.Contender(name, nothing, nothing, m.Place("cpu", threads), {"x": (2,)}, 4, 800)
    return replace(made, **({"run": run} if run else {}), **more)


@pytest.mark.parametrize("wrong", [torch.tensor([0.0, 1.0]), torch.tensor([0.0, float("nan")]), torch.zeros(3)])
def test_gate_refuses_wrong_answers_before_timing(wrong: Tensor) -> None:
    calls = []

    def run(k: int) -> Sequence[Tensor]:
        calls.append(k)
        return (wrong,)

    with pytest.raises(m.WrongAnswerError, match="broken"):
        m.measure(m.Group("op", "small", [fake("right"), fake("broken", run)], ()))
    assert calls == [0]


def test_gate_checks_a_second_input_set() -> None:
    with pytest.raises(m.WrongAnswerError):
        m.gate(m.Group("op", "small", [fake("stale", lambda k: (torch.full((2,), float(k)),))], ()))


def test_gate_prepares_work_in_place() -> None:
    state = torch.ones(2)
    made = fake("in place", lambda k: (state,), prepare=lambda: state.zero_())
    assert m.gate(m.Group("op", "small", [made], ())) == {}


def test_only_an_optional_contender_may_be_missing() -> None:
    def run(_k: int) -> Sequence[Tensor]:
        raise RuntimeError("no compiler")

    assert m.gate(m.Group("op", "small", [fake("a", run, optional=True)], ())) == {
        ("a", 1): "RuntimeError: no compiler"
    }
    with pytest.raises(RuntimeError, match="no compiler"):
        m.gate(m.Group("op", "small", [fake("a", run)], ()))


class FakeClock:
    """A stopwatch for calls that set their own duration."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def work(self, name: str, seconds: Callable[[int], float]) -> Callable[[int], None]:
        def run(number: int) -> None:
            self.now += seconds(number)
            self.order.append(name)

        return run

    def __call__(self, run: Callable[[int], object], first: int, repeats: int) -> float:
        before = self.now
        for number in range(first, first + repeats):
            run(number)
        return self.now - before


def test_interleaved_takes_turns_and_repeats_short_calls() -> None:
    clock = FakeClock()
    group = [fake("slow", clock.work("slow", lambda k: 2.0)), fake("quick", clock.work("quick", lambda k: 1e-4))]
    timings = m.interleaved(group, rounds=4, budget_s=1e9, min_sample_s=1e-3, stopwatch=clock)
    assert timings["slow", 1].samples == [2.0] * 4
    assert timings["quick", 1].samples == pytest.approx([1e-4] * 4)
    turns = [name for name, before in zip(clock.order[1:], clock.order, strict=False) if name != before]
    assert turns[-5:] == ["slow", "quick", "slow", "quick", "slow"]
    assert clock.order.count("quick") >= 4 * 10


def test_interleaved_keeps_its_budget_and_its_minimum_of_rounds() -> None:
    clock = FakeClock()
    group = [fake("slow", clock.work("slow", lambda k: 2.0))]
    assert len(m.interleaved(group, budget_s=10.5, stopwatch=clock)["slow", 1].samples) == 5
    assert len(m.interleaved(group, budget_s=0.0, min_rounds=3, stopwatch=clock)["slow", 1].samples) == 3


def test_interleaved_rotates_inputs_and_restores_threads() -> None:
    seen: list[tuple[int, int]] = []
    before = torch.get_num_threads()
    group = [fake("a", lambda k: seen.append((k, torch.get_num_threads())), threads=before + 1)]
    m.interleaved(group, rounds=3, min_sample_s=0.0)
    assert [k for k, _threads in seen] == list(range(len(seen)))
    assert {threads for _k, threads in seen} == {before + 1}
    assert torch.get_num_threads() == before


def test_timing_statistics() -> None:
    timing = m.Timing([4.0, 1.0, 3.0, 2.0, 100.0])
    assert (timing.median, timing.iqr) == (3.0, 2.0)
    assert m.Timing([1.0]).iqr == 0.0


def measured() -> m.Measured:
    made = [
        fake(name, threads=threads, samples=4, backend=backend, flops=2 * 10**6)
        for threads in (1, 2)
        for name, backend in (("loop", "torch"), ("byola_fast", "reference"), ("copy", "torch"))
    ]
    return m.measure(m.Group("op", "small", made, ("loop", "copy"), floor="copy"), budget_s=0.01)


def test_records_describe_what_was_measured() -> None:
    found = measured()
    record = found.records["byola_fast", 2]
    loop, alone = found.records["loop", 2], found.records["byola_fast", 1]
    assert record.contender == "byola_fast (reference backend)"
    assert record.ratios["loop"] == pytest.approx(loop.median_s / record.median_s)
    assert record.ratios["1 thread"] == pytest.approx(alone.median_s / record.median_s)
    assert record.floor_share == pytest.approx(min(found.samples["copy", 2]) / record.median_s)
    assert record.gb_per_s == pytest.approx(800 / record.median_s / 1e9)
    assert record.gflop_per_s == pytest.approx(2e6 / record.median_s / 1e9)
    assert {"torch", "python"} <= record.versions.keys()
    assert {"cpu", "instruction_set", "gpu"} <= record.machine.keys()
    assert "byola_fast (reference backend)" in "\n".join(terminal_table(found))


def test_rows_of_a_table_have_one_unit() -> None:
    record = measured().records["byola_fast", 1]
    one, eight = (replace(record, samples=n, median_s=0.004, variant=f"B = {n}") for n in (1, 8))
    table = markdown_table(m.Results("pytest", "2026-01-31", [one, eight]), "op").splitlines()
    assert [row.split(" | ")[-1] for row in (table[0], *table[2:4])] == ["µs per sample |", "4000 |", "500 |"]
    alone = markdown_table(m.Results("pytest", "2026-01-31", [one]), "op").splitlines()
    assert [row.split(" | ")[-1] for row in (alone[0], alone[2])] == ["ms |", "4.00 |"]


def test_results_survive_the_file(tmp_path: Path) -> None:
    results = m.Results("pytest benchmarks/", "2026-01-31", list(measured().records.values()))
    m.write_results(tmp_path / "new" / "cpu.json", results)
    assert m.read_results(tmp_path / "new" / "cpu.json") == results


def test_share_of_the_cpu_taken_by_other_processes() -> None:
    assert m._others_share((100.0, 50.0, 10.0), (120.0, 65.0, 20.0)) == 0.25
    assert m._others_share((100.0, 50.0, 10.0), (120.0, 60.0, 20.5)) == 0.0
    assert m._others_share(None, None) is None


def test_backends_are_named_with_the_ops_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"draw_params": "reference", "augment_views_out": "cpp", "normalize_": "cpp"}
    monkeypatch.setattr(c, "backend_in_use", lambda key, op: (answers[op], ""))
    assert c.backend_of("cpu", ["augment_views_out", "normalize_"]) == "cpp"
    assert c.backend_of("cpu", ["draw_params"]) == "reference"
    mixed = c.backend_of("cpu", c.VIEW_OPS)
    assert mixed == "cpp; reference for draw_params"
    assert fake("byola_fast", backend=mixed).label == "byola_fast (cpp; reference for draw_params backend)"
    assert c.backend_of("cpu", ["no_such_op"]) == "torch"


def test_readme_tables_are_regenerated_and_checked(tmp_path: Path) -> None:
    results = m.Results("pytest benchmarks/", "2026-01-31", list(measured().records.values()))
    m.write_results(tmp_path / "cpu.json", results)
    readme = tmp_path / "README.md"
    readme.write_text(
        "# A\n<!-- benchmarks:cpu/op begin -->\nold\n<!-- benchmarks:cpu/op end -->\nB\n", encoding="utf-8"
    )
    options = ["--readme", str(readme), "--results", str(tmp_path)]
    assert readme_table.main([*options, "--check"]) == 1
    assert "old" in readme.read_text(encoding="utf-8")
    assert readme_table.main(options) == 0
    made = readme.read_text(encoding="utf-8")
    assert markdown_table(results, "op") in made
    assert made.startswith("# A\n")
    assert made.endswith("end -->\nB\n")
    assert readme_table.main([*options, "--check"]) == 0
    assert readme_table.main(options) == 0
    assert readme.read_text(encoding="utf-8") == made
    readme.write_text(made.replace("small", "great"), encoding="utf-8")
    assert readme_table.main([*options, "--check"]) == 1


@pytest.mark.parametrize(
    "text",
    ["<!-- benchmarks:cpu/op begin -->\n", "<!-- benchmarks:cpu/none begin -->\n<!-- benchmarks:cpu/none end -->"],
)
def test_readme_markers_must_pair_and_exist(tmp_path: Path, text: str) -> None:
    m.write_results(tmp_path / "cpu.json", m.Results("pytest", "2026-01-31", list(measured().records.values())))
    with pytest.raises(ValueError, match=r"without its partner|no record"):
        readme_table.regenerate(text, tmp_path)


def test_the_chart_holds_the_multiples_of_the_records() -> None:
    results = m.read_results(readme_table.ROOT / "benchmarks" / "results" / "cpu.json")
    svg = speed_chart(results)
    for record in results.records:
        if record.op == "two_views" and record.threads == 1 and record.contender == "byola_fast":
            assert f'class="ours">{record.ratios["loop"]:.1f} x</text>' in svg
    with pytest.raises(ValueError, match="no record of two_views"):
        speed_chart(m.Results("pytest", "2026-01-31", list(measured().records.values())))


def test_the_curves_hold_the_means_of_the_records(tmp_path: Path) -> None:
    folder = readme_table.ROOT / "benchmarks" / "results" / "quality"
    svg = learning_chart(folder)
    curves = [json.loads((folder / f"simclr-short-{seed}.json").read_text())["curve"] for seed in range(3)]
    for points in zip(*curves, strict=False):
        mean = sum(point["mean"] for point in points) / 3
        assert f"<title>SimCLR's loss, segments of 0.31 s, {points[0]['step']} steps: {mean:.1f} %" in html.unescape(
            svg
        )
    assert "2000 steps" not in svg  # of one seed alone
    with pytest.raises(ValueError, match="no record of simclr-short"):
        learning_chart(tmp_path)
