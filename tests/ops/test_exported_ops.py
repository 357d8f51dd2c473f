"""torch.export of every op and of modules made of them: the saved file runs without this package."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim

from byola_fast import Augment, LogMel, augment, ops
from byola_fast.spectrograms.statistics import RunningStats, batch_stats

ALONE = """
import sys
sys.modules["byola_fast"] = None  # an import of it fails
import torch
for path in sys.argv[1:]:
    load = torch.jit.load if path.endswith(".pt") else lambda path: torch.export.load(path).module()
    arguments, expected = torch.load(path + ".calls")
    found = load(path)(*arguments)
    for a, b in zip(found if isinstance(found, tuple) else [found], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
"""
RNG = torch.tensor([3, 4])
COUNT = torch.tensor(4)
WINDOW, BANK, ROWS = torch.hann_window(16), torch.rand(4, 9), torch.randn(6, 8, 12)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function(*arguments)


def in_place(x, lam, index, crop, fader):
    rows, cursor, kept = torch.zeros(5, 8, 12), torch.zeros(3, dtype=torch.int64), x.clone()
    ops.bank_push_(rows, cursor, x)
    ops.ema_update_([kept], [x + 1], 0.9)
    out = torch.empty(2, 3, 8, 12)
    _, sums = ops.augment_views(x, lam, index, crop, fader, RNG, out=out)
    return rows, cursor, kept, ops.normalize(out, sums, inplace=True)


def views(x, lam, index, crop, fader, mixup="log"):
    settings = {"bank": ROWS, "bank_count": COUNT, "mixup": mixup}
    return ops.augment_views(x, lam, index, crop, fader, RNG, **settings)


def programs():
    """Yield name, module, arguments, and for each argument the axis of the batch."""
    x, z, wav = torch.randn(3, 8, 12), torch.randn(3, 8, 12), torch.randn(3, 400)
    drawn = ops.draw_params(RNG, 3, (8, 12), fader_gain=1.0)
    yield "log_mixup_exp", Call(ops.log_mixup_exp), (x, z, drawn[0][0]), (0, 0, 0)
    yield "resize_crop", Call(lambda x, crop: ops.resize_crop(x, crop, (5, 6))), (x, drawn[2][0]), (0, 0)
    yield "draw_params", Call(lambda rng: ops.draw_params(rng, 3, (8, 12), bank_count=COUNT)), (RNG,), (None,)
    yield "augment_views", Call(views), (x, *drawn), (0, 1, 1, 1, 1)
    yield "gaussian", Call(lambda *given: views(*given, mixup="gaussian")), (x, *drawn), (0, 1, 1, 1, 1)
    yield "sums", Call(lambda x: ops.normalize(x, ops.sample_sums(x))), (x.double(),), (0,)
    yield "batch_stats", Call(batch_stats), (x,), (0,)
    yield "in_place", Call(in_place), (x, *drawn), (None,) * 5
    log_mel = Call(lambda wav: ops.log_mel(wav, WINDOW, BANK, n_fft=16, hop_length=8))
    yield "log_mel", log_mel, (wav,), (0,)
    yield "RunningStats", Call(RunningStats().update), (x,), (0,)
    yield "augment", Call(lambda x: augment(x, seed=1, preset="byola-v2")), (x[:, None],), (0,)
    yield "Augment", Augment(seed=1, n_memory=5, shape=(8, 12)), (x,), (0,)
    pipeline = LogMel(n_fft=64, win_length=64, n_mels=8, hop_length=32), Call(lambda x: augment(x, seed=3))
    crops = {"n_views": 3, "local_views": 2, "local_size": (4, 5)}
    yield "multi-crop", Augment(seed=1, n_memory=5, shape=(8, 12), **crops), (x,), (0,)
    yield "pipeline", nn.Sequential(*pipeline), (wav,), (0,)


def run_without_this_package(paths):
    result = subprocess.run([sys.executable, "-c", ALONE, *map(str, paths)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def save_call(path, module, arguments):
    """Keep what the module answers, beside its file."""
    answer = copy.deepcopy(module)(*copy.deepcopy(arguments))
    torch.save((arguments, list(answer) if isinstance(answer, tuple) else [answer]), f"{path}.calls")


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_op_runs_without_this_package(tmp_path, strict):
    paths = []
    for name, module, arguments, axes in programs():
        batch = Dim("batch", min=2, max=2**24)
        sizes = tuple(None if axis is None else {axis: batch} for axis in axes)
        shapes = (sizes,) if isinstance(module, Call) else sizes
        program = torch.export.export(copy.deepcopy(module), arguments, dynamic_shapes=shapes, strict=strict)
        assert not [node for node in program.graph.nodes if "byola_fast" in str(node.target)], name
        paths.append(tmp_path / f"{name}.pt2")
        torch.export.save(program, paths[-1])
        save_call(paths[-1], module, arguments)
    run_without_this_package(paths)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and a traced graph is fixed to its shapes
def test_a_traced_front_end_runs_without_this_package(tmp_path):
    module, arguments = LogMel(n_fft=64, win_length=64, n_mels=8), (torch.randn(3, 400),)
    torch.jit.save(torch.jit.trace(module, arguments), tmp_path / "log_mel.pt")
    save_call(tmp_path / "log_mel.pt", module, arguments)
    run_without_this_package([tmp_path / "log_mel.pt"])
