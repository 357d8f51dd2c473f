"""The stages of ``gpu_check`` that run kernels: properties first, then ceilings, then every goal.

Figures are medians over replays; contenders take turns. Everything timed was checked against the float64 reference in
the same run. The device sleeps while a call is queued, so times include no launch from the host. In a dry run
everything is small and on the CPU, and a CUDA graph is a plain call.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import byola_fast
from benchmarks import contenders
from byola_fast import ops
from byola_fast.ops import reference
from byola_fast.ops._dispatch import backend_in_use

BATCH = 256
VIEW_BYTES = 4 * 64 * 96
STEP_BYTES = 6 * VIEW_BYTES  # per sample: read x and two rows of the bank, write two views and one row of the bank
ROUNDS = 40
COLD_BYTES = 512 * 2**20  # size of all rotating input sets, several times any L2 cache
SLEEP_CYCLES = 1_000_000  # 0.5 ms on the device: longer than the host takes to launch a graph

Run = Callable[[int], Any]


def sizes(context: Any, full: int, dry: int) -> int:
    """Return a size, small in a dry run."""
    return dry if context.dry else full


def graphed(context: Any, run: Callable[[], Any]) -> Callable[[], Any]:
    """Return a replay of ``run`` as a CUDA graph; in a dry run ``run`` itself."""
    if context.skip("capturing a CUDA graph: called directly"):
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    gc.collect()  # freeing a tensor of an older graph would break the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):  # autograd accumulates on the stream of the warm-up
        held = run()

    def replay() -> Any:
        graph.replay()
        return held

    return replay


def every(call: Callable[[], Any]) -> Run:
    """Return ``call`` as a run that ignores the number of the round."""
    return lambda k: call()


def time_in_turns(
    context: Any, runs: dict[str, Run], rounds: int = ROUNDS, *, warm: bool = False
) -> dict[str, dict[str, float]]:
    """Time runs in turns; return each one's median and quartiles in microseconds. Round ``k`` calls ``run(k)``.

    ``warm``: each timed call directly follows the same call untimed, so that its inputs are in the cache.
    """
    rounds = sizes(context, rounds, 2)
    for run in runs.values():
        for k in range(sizes(context, 5, 1)):
            run(k)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(rounds):
        for name, run in runs.items():
            if warm:
                run(k)
            found[name].append(_one_time(context, run, k))
    return {name: _summary(values) for name, values in found.items()}


def _one_time(context: Any, run: Run, k: int) -> float:
    if context.dry:
        started = time.perf_counter()
        run(k)
        return 1e6 * (time.perf_counter() - started)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    run(k)
    end.record()
    end.synchronize()
    return float(1e3 * begin.elapsed_time(end))


def _summary(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median_us": middle, "low_us": low, "high_us": high}


def host_time_us(context: Any, run: Callable[[], Any]) -> float:
    """Return the median host time of a call in microseconds, with the device idle before each call."""
    values = []
    for _ in range(sizes(context, 200, 3)):
        if not context.dry:
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        values.append(1e6 * (time.perf_counter() - started))
    return statistics.median(values)


def row(work: str, measured: str, goals: dict[str, bool]) -> dict[str, Any]:
    """Return a row of the table; ``goals`` says of each goal whether it was met."""
    return {
        "work": work,
        "measured": measured,
        "goal": ", ".join(goals),
        "missed": [goal for goal, met in goals.items() if not met],
    }


def kernel_times(context: Any, run: Run, calls: int = 10) -> dict[str, dict[str, float]]:
    """Return the kernels that take longest: launches and microseconds of each in one call, which is no graph's.

    Last in its stage: a profiler that was once active may slow down what follows.
    """
    if context.skip("times of single kernels"):
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for k in range(calls):
            run(k)
        torch.cuda.synchronize()
    found: dict[str, dict[str, float]] = {}
    for event in profile.events():
        if event.device_type.name == "CUDA":
            one = found.setdefault(event.name[:120], {"launches": 0.0, "us": 0.0})
            one["launches"] += 1 / calls
            one["us"] += event.device_time / calls
    return dict(sorted(found.items(), key=lambda item: -item[1]["us"])[:20])


def passes(context: Any, source: Tensor, target: Tensor, *, update: bool = False) -> dict[str, Callable[[], Any]]:
    """Return plain passes over memory: copies of ``source`` to ``target``, or updates of ``target`` in place.

    The fastest is the floor. In a CUDA graph ``copy_`` becomes a memcpy, which is slower than a kernel.
    """
    calls: dict[str, Callable[[], Any]] = {"torch's pass": partial(torch.neg, source, out=target)}
    calls["memcpy"] = partial(target.copy_, source)
    if update:
        calls = {"torch's pass": partial(target.add_, source, alpha=0.01)}
    if not context.skip("passes over memory in Triton"):
        from benchmarks.gpu.floors import SHAPES, run_pass

        for block, warps in SHAPES:
            calls[f"pass, blocks of {block}"] = partial(run_pass, source, target, update, block, warps)
    return calls


def fastest_pass(times: dict[str, dict[str, float]]) -> float:
    """Return the median of the fastest pass in microseconds."""
    return min(one["median_us"] for name, one in times.items() if "pass" in name or name == "memcpy")


def cold_sets(context: Any, bytes_each: int) -> int:
    """Return how many input sets to rotate, so that none is still in a cache."""
    return sizes(context, max(2, -(-COLD_BYTES // bytes_each)), 2)


def properties(context: Any) -> dict[str, Any]:
    """Check properties other than speed; raise if one does not hold."""
    device, batch = context.device, sizes(context, 64, 4)
    found: dict[str, Any] = {}

    drawn = ops.draw_params(torch.tensor([5, 9], device=device), batch, (64, 96), fader_gain=1.0)
    mels, frames = (list(ops.functional.size_range("scale", n, (0.6, 1.5))) for n in (64, 96))
    rng = torch.tensor([5, 9])
    expected = reference.draw_params_reference(rng, None, batch, batch, 0, 0, mels, frames, [64, 144], 0.4, 1.0, 2, 0)
    for mine, theirs in zip(drawn, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)
    found["parameters_bit_identical_to_the_cpu"] = True

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64 * 96, 8)).to(device)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def both(x: Tensor, step: Tensor) -> Tensor:
        view1, view2 = byola_fast.augment(x, seed=7, step=step, stats=(0.0, 1.0))
        y: Tensor = model(view1) + model(view2)
        return y

    backend = "aot_eager" if context.skip("torch.compile with inductor: traced with aot_eager") else "inductor"
    compiled = torch.compile(both, fullgraph=True, backend=backend)
    x = torch.randn(batch, 64, 96, device=device)
    for step in range(4):
        number = torch.tensor(step, device=device)
        torch.testing.assert_close(compiled(x, number), both(x, number), rtol=1e-3, atol=1e-3)
    found["graphs_compiled"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert found["graphs_compiled"] == 1

    aug = byola_fast.Augment("byola-v2", seed=3, shape=(64, 96), n_memory=4 * batch, stats=(0.0, 1.0)).to(device)
    twin = byola_fast.Augment("byola-v2", seed=3, shape=(64, 96), n_memory=4 * batch, stats=(0.0, 1.0)).to(device)
    static = torch.empty(batch, 64, 96, device=device)
    state = {name: value.clone() for name, value in aug.state_dict().items()}
    replay = graphed(context, lambda: torch.stack(aug(static)))
    aug.load_state_dict(state)
    inputs = [torch.randn_like(static) for _ in range(6)]
    previous = None
    for x in inputs:
        static.copy_(x)
        views = replay().clone()
        assert torch.equal(views, torch.stack(twin(x)))
        assert previous is None or not torch.equal(views, previous)
        previous = views
    assert torch.equal(aug.bank.cursor, twin.bank.cursor)
    found["graph_replays_draw_anew_and_fill_the_bank"] = True

    if not context.skip("two streams at once, and a second GPU"):
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        for _ in range(20):
            results = []
            for stream, x in zip(streams, inputs, strict=False):
                with torch.cuda.stream(stream):
                    results.append(torch.stack(byola_fast.augment(x, seed=1)))
            torch.cuda.synchronize()
            for x, views in zip(inputs, results, strict=False):
                assert torch.equal(views, torch.stack(byola_fast.augment(x, seed=1)))
        found["streams"] = True
        found["gpus"] = torch.cuda.device_count()
        if torch.cuda.device_count() > 1:
            far = torch.stack(byola_fast.augment(inputs[0].to("cuda:1"), seed=1))
            torch.testing.assert_close(far.to(inputs[0].device), torch.stack(byola_fast.augment(inputs[0], seed=1)))
    return found


def ceilings(context: Any) -> dict[str, Any]:
    """Measure the bandwidth of copies of a large tensor, in a graph and as a plain call."""
    large = torch.randn(sizes(context, 2**28, 2**12), device=context.device)
    target = torch.empty_like(large)
    runs = {name: every(graphed(context, call)) for name, call in passes(context, large, target).items()}
    times = time_in_turns(context, runs | {"memcpy, not in a graph": lambda k: target.copy_(large)})
    rates = {name: 2 * large.nbytes / one["median_us"] / 1e3 for name, one in times.items()}
    return {"copy_gb_s": max(rates.values()), "gb_s": rates, "times": times}


def views(context: Any) -> dict[str, Any]:
    """Time two views in a CUDA graph, cold and warm, against a copy, ``compiled`` and ``loop``; and the host time."""
    found: dict[str, Any] = {"rows": []}
    for interpolation in ("bilinear", "bicubic"):
        found[interpolation] = _views(context, interpolation)
        found["rows"] += found[interpolation].pop("rows")
        context.keep(found)
    x, aug = _augmentation(context, "bilinear")
    return found | {"kernels": kernel_times(context, lambda k: aug(x[k % len(x)]))}


def _augmentation(context: Any, interpolation: str) -> tuple[list[Tensor], byola_fast.Augment]:
    """Return inputs to rotate, and an ``Augment`` with a full memory."""
    batch, memory = sizes(context, BATCH, 4), sizes(context, 2048, 8)
    count = cold_sets(context, STEP_BYTES * batch)
    inputs = [torch.randn(batch, 64, 96, device=context.device) for _ in range(count)]
    aug = byola_fast.Augment(seed=1, shape=(64, 96), n_memory=memory, stats=(0.0, 1.0), interpolation=interpolation)
    aug = aug.to(context.device)
    for k in range(-(-memory // batch)):
        aug(inputs[k % count])
    return inputs, aug


def _views(context: Any, interpolation: str) -> dict[str, Any]:
    device = context.device
    inputs, aug = _augmentation(context, interpolation)
    batch, count = len(inputs[0]), len(inputs)
    given = contenders.draw(inputs[0], 0)
    exact = contenders.views_exact(inputs[0], given, interpolation)
    mine = byola_fast.augment(inputs[0], stats=(0.0, 1.0), seed=contenders.SEED, step=0, interpolation=interpolation)
    for view, truth in zip(mine, exact, strict=True):
        torch.testing.assert_close(view.double(), truth, rtol=0, atol=5e-4)

    out = torch.empty(2, batch, 64, 96, device=device)
    source = [torch.randn(STEP_BYTES * batch // 8, device=device) for _ in range(count)]
    copied = [torch.empty_like(s) for s in source]
    graphs = {"byola_fast": [graphed(context, partial(aug, x, out=out)) for x in inputs]}
    for s, c in zip(source, copied, strict=True):
        for name, call in passes(context, s, c).items():
            graphs.setdefault(name, []).append(graphed(context, call))
    found: dict[str, Any] = {}
    try:
        compiled = contenders.views_reference if context.dry else torch.compile(contenders.views_reference)
        for view, truth in zip(compiled(inputs[0], given, interpolation), exact, strict=True):
            torch.testing.assert_close(view.double(), truth, rtol=0, atol=5e-4)
        graphs["compiled"] = [graphed(context, partial(compiled, x, given, interpolation)) for x in inputs[:4]]
    except Exception as error:  # ours must run even if this contender cannot
        found["compiled"] = f"{type(error).__name__}: {error}"
    cold = time_in_turns(context, {name: _rotate(replays) for name, replays in graphs.items()})
    warm = time_in_turns(context, {name: every(replays[0]) for name, replays in graphs.items()}, warm=True)
    one_by_one = partial(contenders.views_loop, inputs[0], contenders.loop_params(given), interpolation)
    loop = time_in_turns(context, {"loop": every(one_by_one)}, rounds=3)["loop"]
    host = host_time_us(context, partial(byola_fast.augment, inputs[0], stats=(0.0, 1.0), seed=1, out=out))
    host_module = host_time_us(context, partial(aug, inputs[0], out=out))

    ours, floor, memcpy = cold["byola_fast"]["median_us"], fastest_pass(cold), cold["memcpy"]["median_us"]
    share, of_loop = floor / ours, loop["median_us"] / ours
    of_compiled = cold["compiled"]["median_us"] / ours if "compiled" in cold else float("nan")
    work = f"two views, {interpolation}, B = {batch}"
    floors = f"a pass over the same bytes {floor:.1f} us ({share:.0%}), memcpy {memcpy:.1f} us"
    goals = {
        ">= 75 % of the rate of a pass": share >= 0.75,
        ">= 3 x `compiled`": of_compiled >= 3,
        ">= 1000 x `loop`": of_loop >= 1000,
    }
    compared = f"{of_compiled:.1f} x `compiled`, {of_loop:.0f} x `loop`"
    in_cache = f"{warm['byola_fast']['median_us']:.1f} us; a pass {fastest_pass(warm):.1f} us"
    hosts = f"{host:.0f} us `augment`, {host_module:.0f} us `Augment`"
    rows = [
        row(f"{work}, in a graph", f"{ours:.1f} us; {floors}; {compared}", goals),
        row(f"{work}, in a graph, inputs in the cache", in_cache, {}),
        row(f"{work}, eager: host time of a call", hosts, {"< 40 us": max(host, host_module) < 40}),
    ]
    found |= {"cold": cold, "warm": warm, "loop": loop, "host_us": host, "host_module_us": host_module}
    return {**found, "batch": batch, "input_sets": count, "rows": rows}


def _rotate(replays: Sequence[Callable[[], Any]]) -> Run:
    return lambda k: replays[k % len(replays)]()


def designs(context: Any) -> dict[str, Any]:
    """Time other ways to stage the resize and to normalise, and the shipped kernel's choices, at B = 256."""
    device, batch = context.device, sizes(context, BATCH, 2)
    if context.skip("timing other designs of the kernel: Triton needs a GPU"):
        return {}
    from benchmarks.gpu.designs import DESIGNS, TRIALS, held_normalize_, run_design
    from byola_fast.ops._triton import augment_views as kernel

    x, bank = (torch.randn(n, 64, 96, device=device) for n in (batch, 2048))
    count, rng = torch.tensor(2048, device=device), torch.tensor([1, 2], device=device)
    lam, index, crop, fader = ops.draw_params(rng, batch, (64, 96), bank_count=count)
    out = torch.empty(2, batch, 64, 96, device=device)

    def shipped() -> Any:
        return ops.augment_views(x, lam, index, crop, fader, rng, bank=bank, bank_count=count, out=out)

    truth = shipped()[0].clone()
    runs: dict[str, Run] = {"shipped": every(graphed(context, shipped))}
    failed: dict[str, str] = {}

    def add(name: str, call: Callable[[], Any], views: Callable[[], Tensor]) -> None:
        """Check a design and capture it; a failed one does not stop the others."""
        try:
            torch.testing.assert_close(views(), truth, rtol=0, atol=1e-3)
            runs[name] = every(graphed(context, call))
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            context.keep({"failed": failed})

    for design in DESIGNS:
        for warps in (4, 8, 16):
            call = partial(run_design, design, x, bank, lam, index, crop, warps)
            add(f"{design}, {warps} warps", call, call)
    chosen = {name: getattr(kernel, name) for trial in TRIALS for name in trial}
    try:
        for trial in TRIALS:
            for name, value in (chosen | trial).items():
                setattr(kernel, name, value)
            label = ", ".join(f"{name} {value}" for name, value in trial.items())
            add(f"shipped, {label}", shipped, lambda: shipped()[0])
    finally:
        for name, value in chosen.items():
            setattr(kernel, name, value)
    made = shipped()[0][:, : batch // 2].contiguous()  # as many as can run at once
    sums = ops.sample_sums(made.flatten(0, 1))
    runs["normalise half of them, a second kernel"] = every(graphed(context, partial(ops.normalize, made, sums)))
    found: dict[str, Any] = {"failed": failed, "times": time_in_turns(context, runs)}
    context.keep(found)  # the barrier has never run, and may hang
    try:
        torch.testing.assert_close(_held(held_normalize_, made), ops.normalize(made, sums), rtol=1e-4, atol=1e-4)
        second = runs["normalise half of them, a second kernel"]
        held = {"a second kernel": second, "held across a barrier": every(partial(held_normalize_, made))}
        found["normalise"] = time_in_turns(context, held)
    except Exception as error:
        failed["held"] = f"{type(error).__name__}: {error}"
    return found


def _held(normalize_: Callable[[Tensor], None], x: Tensor) -> Tensor:
    y = x.clone()
    normalize_(y)
    return y


def ema(context: Any) -> dict[str, Any]:
    """Time the EMA of the whole model, of 1,000 tiny tensors and of one large tensor."""
    device = context.device
    small = contenders_model(sizes(context, 2048, 16), device)
    lists: dict[str, list[Tensor]] = {
        "AudioNTT2020, projector": [p.detach() for p in small.parameters()],
        "1,000 tiny tensors": [torch.randn(100, device=device) for _ in range(1000)],
        "one large tensor": [torch.randn(sizes(context, 100_000_000, 1000), device=device)],
    }
    found = {name: _ema(context, name, online) for name, online in lists.items()}
    return {**found, "rows": [one.pop("row") for one in found.values()]}


def _ema(context: Any, name: str, online: list[Tensor]) -> dict[str, Any]:
    target = [torch.randn_like(x) for x in online]
    expected = [0.99 * t.double() + 0.01 * o.double() for t, o in zip(target, online, strict=True)]
    ops.ema_update_(target, online, 0.99)
    for t, e in zip(target, expected, strict=True):
        torch.testing.assert_close(t.double(), e, rtol=1e-5, atol=1e-6)
    decay = torch.tensor(0.99, dtype=torch.float64, device=context.device)
    flat_target, flat = (torch.cat([x.flatten() for x in tensors]) for tensors in (target, online))
    source = torch.randn(3 * flat.numel() // 2, device=context.device)
    calls: dict[str, Callable[[], Any]] = {
        "byola_fast": partial(torch.ops.byola_fast.ema_update_, target, online, decay),
        "lerp": partial(torch._foreach_lerp_, target, online, 0.01),
        "memcpy": partial(torch.empty_like(source).copy_, source),
        **passes(context, flat, flat_target, update=True),
    }
    if not context.skip("the EMA in Triton, for GPUs without nvcc"):
        from byola_fast.ops._triton import ema_update as triton_backend

        again = [t.clone() for t in target]
        triton_backend.ema_update_(again, online, decay)
        calls["byola_fast"]()
        assert all(torch.equal(a, t) for a, t in zip(again, target, strict=True))
        calls["byola_fast, Triton"] = partial(triton_backend.ema_update_, target, online, decay)
    times = time_in_turns(context, {who: every(graphed(context, call)) for who, call in calls.items()})
    host = {who: host_time_us(context, call) for who, call in calls.items() if who.startswith(("byola", "lerp"))}
    ours, floor = times["byola_fast"]["median_us"], fastest_pass(times)
    memcpy = times["memcpy"]["median_us"]
    floors = f"a pass over the same bytes {floor:.1f} us ({floor / ours:.0%}), memcpy {memcpy:.1f} us"
    hosts = f"host {host['byola_fast']:.0f}, its {host['lerp']:.0f} us"
    backend = backend_in_use(torch.device(context.device).type.upper(), "ema_update_")[0]
    goals = {"host time <= `_foreach_lerp_`": host["byola_fast"] <= host["lerp"]}
    if "tiny" not in name:
        goals[">= 90 % of the rate of a pass"] = floor / ours >= 0.9
    work = f"EMA: {name}" + (f" ({backend} backend)" if backend not in ("cpp", "cuda") else "")
    of_lerp = times["lerp"]["median_us"] / ours
    measured = f"{ours:.1f} us; {floors}; {of_lerp:.2f} x `_foreach_lerp_`; {hosts}"
    return {"times": times, "host_us": host, "backend": backend, "row": row(work, measured, goals)}


def contenders_model(feature_d: int, device: str) -> torch.nn.Module:
    """Return BYOL-A's encoder and projector."""
    byol = byola_fast.BYOL(byola_fast.AudioNTT2020(d=feature_d), proj_dim=4096 if feature_d > 100 else 32)
    return byol.online.to(device)


def front_end(context: Any) -> dict[str, Any]:
    """Time waveforms (float32, int16) to two views against torchaudio's log-mel and ``compiled``; memory, host time."""
    import torchaudio

    device, batch = context.device, sizes(context, BATCH, 2)
    count = sizes(context, 4, 1)  # sets of 16 MB to rotate; torchaudio's intermediates also clear the cache
    whole = [(8192 * torch.randn(batch, 15200, device=device)).clamp(-32768, 32767).short() for _ in range(count)]
    wavs = [one.float() / 32768 for one in whole]
    to_lms = byola_fast.LogMel().to(device)
    theirs = torchaudio.transforms.MelSpectrogram(
        16000, 1024, 1024, 160, f_min=60.0, f_max=7800.0, n_mels=64, power=2.0, norm="slaney", mel_scale="slaney"
    ).to(device)

    def common(wav: Tensor) -> Tensor:
        return (theirs(wav) + contenders.EPS).log()

    exact = reference.log_mel_reference(
        wavs[0].double(), to_lms.window, to_lms.filter_bank, to_lms.bands, None, 1024, 160, True
    )
    for lms in (to_lms(wavs[0])[:, 0], to_lms(whole[0])[:, 0], common(wavs[0])):
        torch.testing.assert_close(lms.double(), exact, rtol=0, atol=1e-4)
    given = contenders.draw(to_lms(wavs[0])[:, 0], 0)
    compiled = contenders.views_reference if context.dry else torch.compile(contenders.views_reference)
    aug = byola_fast.Augment(seed=0, shape=(64, 96), stats=(-8.0, 5.0)).to(device)
    calls: dict[str, tuple[Callable[[Tensor], Any], list[Tensor]]] = {
        "byola_fast": (lambda wav: aug(to_lms(wav)), wavs),
        "byola_fast, int16": (lambda wav: aug(to_lms(wav)), whole),
        "torchaudio and compiled": (lambda wav: compiled(common(wav), given, "bilinear"), wavs),
        "byola_fast, log-mel": (to_lms, wavs),
        "byola_fast, int16, log-mel": (to_lms, whole),
        "torchaudio, log-mel": (common, wavs),
    }
    runs = {
        name: _rotate([graphed(context, partial(call, wav)) for wav in inputs])
        for name, (call, inputs) in calls.items()
    }
    times = time_in_turns(context, runs)
    medians = {name: one["median_us"] for name, one in times.items()}
    extra = {name: extra_bytes(context, partial(call, inputs[0])) for name, (call, inputs) in calls.items()}
    host, theirs_us = host_time_us(context, lambda: to_lms(wavs[0])), medians["torchaudio and compiled"]
    rows = []
    for label, name in (("", "byola_fast"), (", int16", "byola_fast, int16")):
        ratio = theirs_us / medians[name]
        measured = f"{medians[name]:.0f} us; {ratio:.1f} x torchaudio + `compiled`"
        rows.append(row(f"wav to two views{label}, B = {batch}, in a graph", measured, {">= 4 x": ratio >= 4}))
    ours, other = "byola_fast, log-mel", "torchaudio, log-mel"
    message = f"{medians[ours]:.0f} us, int16 {medians['byola_fast, int16, log-mel']:.0f} us; "
    message += f"{medians[other] / medians[ours]:.1f} x torchaudio"
    goals = {}
    if (mine := extra[ours]) is not None and (memory := extra[other]) is not None:
        message += f"; {mine / 2**20:.0f} MiB on top of input and output, torchaudio's {memory / 2**20:.0f}"
        goals["< 10 % of its memory"] = mine < 0.1 * memory
    rows.append(row(f"wav to log-mel, B = {batch}", f"{message}; host {host:.0f} us", goals))
    found = {"times": times, "extra_bytes": extra, "host_us": host, "rows": rows}
    context.keep(found)
    names = ("byola_fast", "byola_fast, int16, log-mel")
    eager = {name: _rotate([partial(calls[name][0], wav) for wav in calls[name][1]]) for name in names}
    return found | {"kernels": {name: kernel_times(context, run) for name, run in eager.items()}}


def extra_bytes(context: Any, call: Callable[[], Any]) -> int | None:
    """Return the peak device memory of a call in bytes, without its inputs and results."""
    if context.skip("peak memory of a call: only CUDA's allocator counts it"):
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    held = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    returned = torch.cuda.memory_allocated() - before
    del held
    return peak - returned


def training(context: Any) -> dict[str, Any]:
    """Time the whole step of byola-v1, feature_d 2048, bfloat16, in a CUDA graph, at several batch sizes."""
    device = context.device
    found: dict[str, Any] = {"samples_per_s": {}}
    for batch in (256, 1024, 2048) if not context.dry else (4,):
        replay = graphed(context, _training_step(context, batch, device))
        times = time_in_turns(context, {"step": every(replay)}, rounds=10)
        found["samples_per_s"][batch] = batch / times["step"]["median_us"] * 1e6
        context.keep(found)
        del replay
        torch._dynamo.reset()
    best = max(found["samples_per_s"].values())
    x = torch.randn(sizes(context, BATCH, 4), 64, 96, device=device)
    given = contenders.loop_params(contenders.draw(x, 0))
    loop = time_in_turns(context, {"loop": every(partial(contenders.views_loop, x, given, "bilinear"))}, rounds=3)
    at_256 = next(iter(found["samples_per_s"].values()))
    with_loop = len(x) / (len(x) / at_256 + loop["loop"]["median_us"] / 1e6)
    message = f"{best:,.0f} samples/s; {at_256:,.0f} at B = {len(x)}, {at_256 / with_loop:.1f} x the step with `loop`"
    goals = {">= 75,000 samples/s": best >= 75_000, ">= 5 x": at_256 / with_loop >= 5}
    made = row("training step, byola-v1, d = 2048, bf16, in a graph", message, goals)
    found |= {"rows": [made], "loop_us": loop["loop"]["median_us"]}
    context.keep(found)
    step = _training_step(context, len(x), device)
    for _ in range(3):
        step()
    return found | {"kernels": kernel_times(context, every(step), 3)}


def _training_step(context: Any, batch: int, device: str) -> Callable[[], Tensor]:
    """Return one training step: log-mel, views, networks, loss, Adam, EMA."""
    wav = torch.randn(batch, 15200, device=device)
    to_lms = byola_fast.LogMel().to(device)
    aug = byola_fast.Augment("byola-v1", seed=0, shape=(64, 96), stats=(-8.0, 5.0)).to(device)
    width = sizes(context, 2048, 16)
    byol = byola_fast.BYOL(byola_fast.AudioNTT2020(d=width), proj_dim=sizes(context, 4096, 32)).to(device)
    byol = byol.to(memory_format=torch.channels_last)
    trained = [p for p in byol.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-4, fused=not context.dry, capturable=not context.dry)
    networks = byol if context.skip("torch.compile of the networks") else torch.compile(byol)

    def step() -> Tensor:
        view1, view2 = aug(to_lms(wav))
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss: Tensor = networks(view1, view2)[0]
        optimizer.zero_grad(set_to_none=True)  # as the trainer
        loss.backward()
        optimizer.step()
        byol.update_target()
        return loss

    return step
