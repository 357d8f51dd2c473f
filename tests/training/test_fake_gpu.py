"""Every step on tensors that only claim to be on a GPU: reading a value back, or mixing devices, raises on any machine.

Fake tensors have shapes, dtypes and devices but no values. What would have to wait for the device (``item``, ``bool``,
``nonzero``, a mask as index) cannot be answered, and copies between host and device are seen as they are dispatched.
What a step may not do here it may not do inside a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from byola_fast import EMA, AudioNTT2020, AudioNTT2022, Augment, LogMel, RunningStats, augment, make_learner
from byola_fast.audio.batches import as_float
from byola_fast.embedding.embedder import Embedder
from byola_fast.networks.ema import CosineDecay

GPU = torch.device("cuda", 0)
FAKE = FakeTensorMode()
BY_DESIGN = ("byola_fast::ema_update_",)  # a decay on the CPU becomes an argument of the launch


class NoCopies(TorchDispatchMode):
    """Refuse what touches both the CPU and the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, answer)) if isinstance(x, Tensor)}
        assert len(devices) < 2 or func._schema.name in BY_DESIGN, f"{func} on {devices}"
        return answer


def put(module: nn.Module) -> Any:
    """Move a module to the fake GPU."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not tensor.is_cuda:
                    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
                    there = FakeTensor(FAKE, meta, GPU)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(there, tensor.requires_grad) if is_parameter else there
    return module


def noise(*shape: int, **kwargs: Any) -> Tensor:
    return torch.randn(*shape, device=GPU, **kwargs)


def test_what_must_not_happen_raises():
    with FAKE, NoCopies():
        x = noise(3)
        for forbidden in (
            lambda: x.sum().item(),
            lambda: bool(x.any()),
            lambda: x[x > 0].sum().item(),
            lambda: torch.zeros(3).to(GPU),
            lambda: x.cpu(),
            lambda: x + torch.zeros(3),
        ):
            with pytest.raises((RuntimeError, AssertionError)):
                forbidden()


@pytest.mark.parametrize("stats", [None, (0.0, 1.0)])
@pytest.mark.parametrize("mixup", ["log", "linear", "gaussian", "none"])
def test_augment(mixup, stats):
    with FAKE, NoCopies():
        for seed in (None, 3, torch.zeros((), dtype=torch.int64, device=GPU)):
            *views, params = augment(
                noise(4, 1, 64, 96), stats=stats, seed=seed, mixup=mixup, preset="byola-v2", return_params=True
            )
            assert {view.device for view in views} == {GPU}
            augment(noise(4, 1, 64, 96), params=params, mixup=mixup, stats=stats)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stats": (0.0, 1.0), "n_memory": 0},
        {"stats": RunningStats, "bank_dtype": torch.float16},
        {"preset": "byola-v2", "mixup": "gaussian", "post_norm": False, "shape": (64, 96)},
    ],
)
def test_the_module(settings, training):
    settings = settings | ({"stats": RunningStats(3)} if settings.get("stats") is RunningStats else {})
    aug = put(Augment(**({"seed": 1, "n_memory": 16} | settings)).train(training))
    with FAKE, NoCopies():
        for _ in range(2):
            *_, params = aug(noise(4, 1, 64, 96), return_params=True)
        aug(noise(4, 1, 64, 96), params=params)


@pytest.mark.slow
@pytest.mark.parametrize("n_fft", [1024, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int16, torch.float64])
def test_log_mels(dtype, n_fft):
    to_lms = put(LogMel(n_fft=n_fft, win_length=400))
    with FAKE, NoCopies():
        wav = torch.zeros(3, 15200, dtype=dtype, device=GPU)
        assert to_lms(wav, stats=torch.zeros(2, device=GPU)).device == GPU


def local_views(count: int) -> dict[str, Any]:
    return {"local_views": count, "local_size": (64, 32)} if count else {}


@pytest.mark.parametrize("decay", [0.99, CosineDecay(0.9, 100)])
@pytest.mark.parametrize(
    ("objective", "crops"), [("byol", 0), ("simclr", 0), ("moco", 0), ("cola", 0), ("byol", 2), ("simclr", 2)]
)
def test_a_step_but_for_its_backward_pass(objective, crops, decay):
    settings = {"ema_decay": decay} if objective in ("byol", "moco") else {}
    settings |= {"queue_size": 12} if objective == "moco" else {}
    learner = make_learner(objective, AudioNTT2020(d=64), proj_size=16, proj_dim=32, **settings)
    learner, aug, to_lms = (
        put(learner),
        put(Augment(n_memory=16, shape=(64, 96), seed=3, stats=(0.0, 1.0), **local_views(crops))),
        put(LogMel()),
    )
    with FAKE, NoCopies():
        wav = torch.zeros(8, 15200, dtype=torch.int16, device=GPU)
        for _ in range(2):
            view1, view2, *local = aug(to_lms(as_float(wav)))
            loss, projection = learner(view1, view2, local) if local else learner(view1, view2)
            learner.update_target()
        assert loss.device == projection.device == GPU


@pytest.mark.parametrize("buffers", ["none", "copy", "ema"])
def test_the_moving_average(buffers):
    online = AudioNTT2020(d=16)
    ema = EMA(online, CosineDecay(0.9, 100), buffers)
    put(ema), put(online)
    with FAKE, NoCopies():
        for _ in range(2):
            ema.update()


def test_embeddings():
    embedder = put(Embedder(AudioNTT2022(), stats=(0.0, 1.0)).eval())
    with FAKE, NoCopies(), torch.no_grad():
        embedder(noise(2, 16000))
        embedder(noise(100), frames=True)
