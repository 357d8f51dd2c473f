"""Augment in other programs: workers of a data loader, checkpointed activations, ranks, averaged models, Lightning."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import ranks
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from byola_fast import EMA, Augment, LogMel, MemoryBank, RunningStats, augment
from byola_fast.runtime.distributed import join
from byola_fast.spectrograms.statistics import compute_stats
from byola_fast.views.augment import _Call

HALF = [torch.float16, torch.bfloat16]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in module.state_dict().items()}


def assert_same_state(module: nn.Module, wanted: dict[str, Tensor]) -> None:
    state = module.state_dict()
    assert state.keys() == wanted.keys()
    for name, x in wanted.items():
        assert torch.equal(state[name], x), name


# --- Workers of a data loader.


class Views(Dataset):
    """Views of 16 samples, made one by one in the workers: lam, and the rows in the worker's memory."""

    def __init__(self, aug: Augment) -> None:
        self.aug = aug
        self.lms = torch.randn(16, 8, 12, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.lms)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        _, _, params = self.aug(self.lms[index, None], return_params=True)
        return params.lam[:, 0], torch.tensor(len(self.aug.bank))


class Collate:
    """The same, made in ``collate_fn``."""

    def __init__(self, aug: Augment) -> None:
        self.aug = aug

    def __call__(self, samples: list[Tensor]) -> tuple[Tensor, Tensor]:
        _, _, params = self.aug(torch.stack(samples), return_params=True)
        return params.lam.T, torch.tensor(len(self.aug.bank))


def epochs(aug: Augment, context: str, *, collate: bool = False, **settings: Any) -> tuple[Tensor, Tensor]:
    """Return lam ``(2 epochs, 16 samples, 2 views)`` and the rows in the workers' memories in the last epoch."""
    torch.manual_seed(7)
    settings |= {"batch_size": 4, "num_workers": 2, "multiprocessing_context": context}
    data = Views(aug)
    loader = DataLoader(data.lms, collate_fn=Collate(aug), **settings) if collate else DataLoader(data, **settings)
    seen = [list(loader) for _ in range(2)]
    lam = torch.stack([torch.cat([lam for lam, _ in epoch]) for epoch in seen])
    return lam, torch.cat([rows.flatten() for _, rows in seen[-1]])


@pytest.mark.parametrize(
    ("context", "persistent"),
    [
        ("fork", False),
        ("fork", True),
        pytest.param("forkserver", False, marks=pytest.mark.slow),
        pytest.param("spawn", True, marks=pytest.mark.slow),  # each start takes seconds
    ],
)
def test_workers_and_epochs_draw_their_own_parameters_and_repeat_for_one_seed(context, persistent):
    aug = Augment(seed=5, n_memory=32, stats=(0.0, 1.0), shape=(8, 12))
    lam, rows = epochs(aug, context, persistent_workers=persistent)
    assert len(lam.unique()) == 2 * 16 * 2  # all differ
    assert rows.max() == (16 if persistent else 8)  # a worker sees half of the samples of an epoch
    assert len(aug.bank) == 0
    assert aug.rng.tolist() == [5, 0]
    again, _ = epochs(aug, context, persistent_workers=persistent)
    assert torch.equal(lam, again)


def test_a_loader_with_a_generator_and_another_seed():
    lam = [
        epochs(Augment(seed=seed, n_memory=0, stats=(0.0, 1.0)), "fork", generator=torch.Generator().manual_seed(9))[0]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(lam[0], lam[1])
    assert not (lam[0] == lam[2]).any()


def test_workers_that_collate_draw_their_own_parameters():
    lam, _ = epochs(Augment(seed=5, n_memory=8), "fork", collate=True)
    assert len(lam.unique()) == 2 * 16 * 2


def test_workers_warn_that_their_memory_ends_with_them(tmp_path):
    handler = logging.FileHandler(tmp_path / "log")  # which workers inherit
    logging.getLogger("byola_fast").addHandler(handler)
    for n_memory, warnings in ((0, 0), (8, 1)):
        epochs(Augment(seed=5, stats=(0.0, 1.0), n_memory=n_memory), "fork", persistent_workers=True)
        log = (tmp_path / "log").read_text()
        assert log.count("memory and running statistics are the worker's own") == warnings
    logging.getLogger("byola_fast").removeHandler(handler)


# --- Activation checkpointing.


class Steps(nn.Module):
    """Two parts that make views in several ways; ``parts`` says which of them are checkpointed."""

    def __init__(self, parts: str, reentrant: bool, learned_front: bool) -> None:
        super().__init__()
        self.parts, self.reentrant, self.learned_front = parts, reentrant, learned_front
        torch.manual_seed(0)
        self.aug = Augment("byola-v2", seed=1, n_memory=8)
        crops = {"n_views": 1, "local_views": 1, "local_size": (5, 10)}
        self.local = Augment(seed=2, n_memory=8, size=(6, 10), mixup="gaussian", **crops)
        self.front = nn.Linear(12, 12)
        self.net = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 4), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(10, 4), nn.Tanh())

    def first(self, x: Tensor, anchor: Tensor) -> Tensor:
        view1, view2 = self.aug(x)
        return (self.net(view1) * self.net(view2)).mean() * anchor

    def second(self, x: Tensor, anchor: Tensor) -> Tensor:
        view1, view2 = self.local(self.front(x) if self.learned_front else x)
        loss = (self.head(view1).mean(1) * self.head(view2).mean(1)).mean()
        return (loss + self.net(self.aug(x)[0]).mean() + self.net(self.aug(x)[1]).square().mean()) * anchor

    def both(self, x: Tensor, anchor: Tensor) -> Tensor:
        return self.first(x + 1, anchor) + self.run(self.second, x * 2, anchor) + self.first(x, anchor)

    def run(self, part: Any, x: Tensor, anchor: Tensor) -> Tensor:
        if self.parts == "none":
            return part(x, anchor)
        return checkpoint(part, x, anchor, use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        anchor = torch.ones((), requires_grad=True)  # use_reentrant=True wants an input with a gradient
        if self.parts == "one after another":
            return self.run(self.first, x + 1, anchor) + self.run(self.second, x * 2, anchor) + self.first(x, anchor)
        return self.run(self.both, x, anchor)

    def gradients(self) -> Iterator[Tensor]:
        """Yield the gradients of three steps, each of two forward passes followed by both backward passes, twice."""
        torch.manual_seed(3)
        for _ in range(3):
            losses = [self(torch.randn(4, 8, 12)) for _ in range(2)]
            for retain in (True, False):
                self.zero_grad()
                for loss in losses:
                    loss.backward(retain_graph=retain)
                yield from (x.grad.clone() for x in self.parameters() if x.grad is not None)


@pytest.mark.parametrize("learned_front", [False, True], ids=["fixed front end", "learned front end"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
@pytest.mark.parametrize("parts", ["one after another", "nested"])
def test_checkpointed_activations_see_the_same_views_and_move_no_state(parts, reentrant, learned_front):
    plain, saving = Steps("none", False, learned_front), Steps(parts, reentrant, learned_front)
    wanted, got = list(plain.gradients()), list(saving.gradients())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert_same_state(saving, state_of(plain))
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x) is _Call]  # nothing outlives its graph


def test_what_cannot_be_computed_again_says_so():
    x, net = torch.randn(4, 8, 12), nn.Linear(12, 3)
    bank, stats, generator = MemoryBank(4), RunningStats(), torch.Generator().manual_seed(1)
    for change, words in (
        (lambda: bank.push(x), "MemoryBank.push: called by a backward pass"),
        (lambda: stats.update(x), r"RunningStats.update: called by a backward pass"),
        (lambda: augment(x, generator=generator), "generator: expected none under activation checkpointing"),
    ):
        loss = checkpoint(lambda change=change: (change(), net(x).sum())[1], use_reentrant=False)
        with pytest.raises(RuntimeError, match=words):
            loss.backward()
    aug, state = Augment(seed=1), {}
    x.requires_grad_().register_hook(lambda grad: (state.update(state_of(aug)), aug(x.detach()))[1][0])
    aug(x.detach())
    with pytest.raises(RuntimeError, match=r"Augment: called by a backward pass .* without a record"):
        net(x).sum().backward()
    assert_same_state(aug, state)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True], ids=["checkpoint compiled", "compiled inside a checkpoint"])
def test_checkpoints_and_torch_compile(inside):
    aug, twin = (Augment(seed=1, n_memory=8, shape=(8, 12)) for _ in range(2))
    net = nn.Linear(12, 3)

    def part(x: Tensor) -> Tensor:
        return net(aug(x)[0]).square().mean()

    def saving(run: Any, x: Tensor) -> Tensor:
        return checkpoint(run, x, use_reentrant=False)

    torch._dynamo.reset()
    compiled = torch.compile(part) if inside else torch.compile(saving)
    for _ in range(3):
        x = torch.randn(4, 8, 12)
        loss = saving(compiled, x) if inside else compiled(part, x)
        (got,) = torch.autograd.grad(loss, net.weight)
        (wanted,) = torch.autograd.grad(net(twin(x)[0]).square().mean(), net.weight)
        torch.testing.assert_close(got, wanted)
        assert_same_state(aug, state_of(twin))
    if not inside:
        torch._dynamo.reset()
        with pytest.raises(Exception, match="side effect"):
            torch.compile(saving, fullgraph=True)(part, x)
    torch._dynamo.reset()


# --- Ranks.


def draw_as_rank() -> list[list[Any]]:
    with join(torch.device("cpu")) as world:
        lms = torch.randn(8, 8, 12, generator=torch.Generator().manual_seed(0)).chunk(world.size)[world.rank]
        drawn = []
        for sync in (False, True):
            aug = Augment(seed=1, n_memory=8, sync=sync)
            ours = [aug(lms, return_params=True)[2], augment(lms, seed=1, return_params=True)[2]]
            ours += [aug(lms, sample_offset=0, return_params=True)[2]]
            if world.first:  # validation on one rank waits for no other
                aug.eval()(lms[:3])
            loader = DataLoader(Views(aug.train()).lms, 8, collate_fn=Collate(aug), num_workers=2)
            drawn.append([*ours, torch.cat([lam for lam, _ in loader])])
        return drawn


@pytest.mark.slow
def test_ranks_draw_the_parameters_of_their_part_of_the_batch(tmp_path):
    for whole, *parts in zip(draw_as_rank(), *ranks.run(2, tmp_path, draw_as_rank), strict=True):
        for number in range(2):
            for name in ("lam", "crop", "fader"):
                both = torch.cat([getattr(part[number], name) for part in parts], dim=1)
                assert torch.equal(both, getattr(whole[number], name))
        assert [part[0].sample_offset for part in parts] == [0, 4]
        assert torch.equal(parts[0][2].lam, parts[1][2].lam)  # 0 means 0
        in_workers = torch.cat([part[3] for part in parts])
        assert len(in_workers.unique()) == in_workers.numel()


# --- Evaluation.


def test_eval_mode_changes_no_state_and_repeats_its_views():
    aug = Augment("byola-v2", seed=1, n_memory=6)
    fresh = state_of(aug.eval())
    first = aug(torch.randn(3, 8, 12))  # before any batch
    assert first[0].isfinite().all()
    assert_same_state(aug, fresh)
    aug.train()(torch.randn(3, 8, 12))
    before = state_of(aug.eval())
    x = torch.randn(5, 8, 12)
    for a, b in zip(aug(x), aug(x), strict=True):
        assert torch.equal(a, b)
    params = aug(x, return_params=True)[2]
    assert torch.equal(aug(x, params=params)[0], aug(x)[0])
    assert int(params.bank_count) == 3
    assert_same_state(aug, before)


# --- State dicts, copies and parameters as data.


@pytest.mark.parametrize("shape", [None, (8, 12)])
def test_a_cursor_without_its_rows_is_refused_or_begins_empty(shape):
    aug = Augment(seed=1, n_memory=4)
    aug(torch.randn(3, 8, 12))
    state = {name: x for name, x in aug.state_dict().items() if name != "bank.rows"}
    model = nn.ModuleDict({"aug": Augment(n_memory=4, shape=shape)})
    prefixed = {f"aug.{name}": x for name, x in state.items()}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "aug.bank.rows"\.'):
        model.load_state_dict(prefixed)
    assert model.load_state_dict(prefixed, strict=False).missing_keys == ["aug.bank.rows"]
    assert len(model["aug"].bank) == 0
    assert model["aug"](torch.randn(2, 8, 12), return_params=True)[2].bank_count == 0
    unused = Augment(n_memory=4).state_dict()  # no rows were ever there
    assert model.load_state_dict({f"aug.{name}": x for name, x in unused.items()})


@pytest.mark.slow
def test_a_distributed_checkpoint_that_fills_a_state_dict_in_place(tmp_path):
    from torch.distributed import checkpoint as saving

    aug = Augment(seed=1, n_memory=4)
    aug(torch.randn(3, 8, 12))
    saving.save(aug.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    unshaped, shaped = Augment(n_memory=4), Augment(n_memory=4, shape=(8, 12))
    for fresh in (unshaped, shaped):
        saving.load(fresh.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    x = torch.randn(3, 8, 12)
    with pytest.raises(RuntimeError, match=r"MemoryBank: expected the 3 rows .*, got none; give shape="):
        unshaped(x)
    for a, b in zip(aug(x), shaped(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [None, (8, 12)])
def test_a_bank_of_another_size_is_named(shape):
    aug = Augment(n_memory=4, shape=(8, 12))
    with pytest.raises(RuntimeError, match=r"aug.bank.rows: .*\b6\b"):
        nn.ModuleDict({"aug": Augment(n_memory=6, shape=shape)}).load_state_dict(
            {f"aug.{name}": x for name, x in aug.state_dict().items()}
        )


def test_parameters_load_safely_compare_and_move():
    _, _, params = augment(torch.randn(3, 8, 12), seed=1, return_params=True)
    file = io.BytesIO()
    torch.save({"params": params}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["params"]
    assert loaded == params == pickle.loads(pickle.dumps(params))
    assert params != replace(params, sample_offset=1)
    assert params != replace(params, lam=params.lam + 1)
    assert params != replace(params, bank_count=torch.tensor(0))
    assert params != 3
    assert params.to("meta", non_blocking=True).lam.is_meta


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models_follow_a_memory_without_a_shape(use_buffers):
    model = nn.ModuleDict({"aug": Augment(seed=2**60, n_memory=4), "net": nn.BatchNorm1d(12)})
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    ema = EMA(model, 0.5, buffers="copy")
    for _ in range(2):
        view1, _ = model["aug"](torch.randn(3, 8, 12))
        model["net"](view1[:, 0])
        averaged.update_parameters(model)
        ema.update()
    for copied in (ema.target, *([] if use_buffers else [averaged.module])):
        assert_same_state(copied, state_of(model))
    assert averaged.module["aug"](torch.randn(3, 8, 12))[0].isfinite().all()


def test_copies_of_a_memory_stay_apart():
    aug = Augment(seed=1, n_memory=4)
    twin = copy.deepcopy(aug)
    x = torch.randn(3, 8, 12)
    views = aug(x)
    assert len(twin.bank) == 0
    for a, b in zip(twin(x), views, strict=True):
        assert torch.equal(a, b)
    assert twin.bank.rows.data_ptr() != aug.bank.rows.data_ptr()


# --- Half precision.


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_leaves_statistics_memory_and_filter_bank_alone(dtype):
    plain, half = (nn.ModuleDict({"to_lms": LogMel(), "aug": Augment(seed=1, n_memory=8)}) for _ in range(2))
    half.to(dtype)
    saved = {name: x.to(dtype) if x.is_floating_point() else x.clone() for name, x in plain.state_dict().items()}
    half.load_state_dict(saved, assign=True)
    for _ in range(3):
        wav = 0.1 * torch.randn(4, 15200)
        lms = plain["to_lms"](wav)
        assert torch.equal(half["to_lms"](wav), lms)
        for a, b in zip(half["aug"](lms), plain["aug"](lms), strict=True):
            assert torch.equal(a, b)
    half.to(dtype)
    assert_same_state(half, state_of(plain))


@pytest.fixture
def default_dtype() -> Iterator[Any]:
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
def test_results_do_not_depend_on_the_default_dtype(dtype, default_dtype):
    wav = (0.1 * torch.randn(4, 4000, generator=torch.Generator().manual_seed(1))).float()

    def results() -> list[Tensor]:
        lms = LogMel()(wav)
        augs = [Augment("byola-v2", seed=1, n_memory=8), Augment(seed=1, stats=(-4.1, 3.3), mixup="gaussian")]
        views = [view for aug in augs for _ in range(2) for view in aug(lms)]
        return [
            lms,
            *views,
            *augment(lms, seed=1, stats=(-4.1, 3.3)),
            augs[0].running_stats.stats(),
            augs[1].fixed_stats,
        ]

    wanted = results()
    default_dtype(dtype)
    for a, b in zip(results(), wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_statistics_put_into_half_precision_from_outside_are_refused():
    stats = RunningStats()
    stats.mean.data = stats.mean.half()  # as FSDP's buffer_dtype does
    with pytest.raises(TypeError, match=r"RunningStats.mean: expected torch.float32, got torch.float16"):
        stats.update(torch.randn(3, 8, 12))


# --- Default devices and the meta device.


def test_modules_built_on_meta_equal_the_original_once_loaded():
    wav = 0.1 * torch.randn(4, 4000)

    def build() -> nn.ModuleDict:
        fixed = Augment(seed=2, n_memory=8, stats=torch.tensor([-4.1, 3.3]))
        return nn.ModuleDict({"to_lms": LogMel(n_mels=32), "aug": Augment(n_memory=8), "fixed": fixed})

    original = build()
    original["aug"](original["to_lms"](wav))
    state = state_of(original)
    for assign in (False, True):
        with torch.device("meta"):
            model = build()
        assert {x.device.type for x in model.buffers()} == {"meta"}
        model.to_empty(device="cpu")
        model.load_state_dict(state, assign=assign)
        twin = build()
        twin.load_state_dict(state)
        lms = twin["to_lms"](wav)
        assert torch.equal(model["to_lms"](wav), lms)
        for name in ("aug", "fixed"):
            for a, b in zip(model[name](lms), twin[name](lms), strict=True):
                assert torch.equal(a, b)


def test_inputs_on_the_cpu_work_under_another_default_device():
    wav = 0.1 * torch.randn(4, 4000)
    to_lms, aug = LogMel(), Augment(seed=1, n_memory=8)
    lms = to_lms(wav)
    wanted = [*augment(lms, seed=1), *copy.deepcopy(aug)(lms), *augment(lms, seed=1, stats=(-4.0, 3.0))]
    stats = compute_stats([lms])
    with torch.device("meta"):
        for a, b in zip(
            [*augment(lms, seed=1), *aug(lms), *augment(lms, seed=1, stats=(-4.0, 3.0))], wanted, strict=True
        ):
            assert torch.equal(a, b)
        assert torch.equal(to_lms(wav), lms)
        assert to_lms(wav.double()).isfinite().all()
        assert compute_stats([lms]) == stats
        aug(lms, params=aug(lms, return_params=True)[2])


# --- Lightning and Transformers.


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "32-true"])
def test_lightning_trains_in_half_precision_and_validation_changes_nothing(precision, tmp_path):
    import pytorch_lightning as lightning

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.aug = Augment("byola-v2", seed=1, n_memory=8)
            self.net = nn.Linear(12, 4)
            self.seen: list[tuple[Tensor, ...]] = []

        def training_step(self, batch: Any, _number: int) -> Tensor:
            lms, params = batch
            replayed = self.aug(lms, params=params)
            self.seen.append((lms, *self.aug(lms), *replayed))
            return self.net(self.seen[-1][1]).square().mean()

        def validation_step(self, batch: Any, _number: int) -> None:
            self.aug(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    lms = 3 * torch.randn(4, 4, 8, 12) - 4.1
    batches = [(x, augment(x, seed=2, return_params=True)[2]) for x in lms]
    tasks = []
    for validated in (0, 1.0):
        task = Task()
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            precision=precision,
            limit_val_batches=validated,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loaders = [DataLoader(batches, batch_size=None) for _ in range(2)]
        trainer.fit(task, *loaders)
        tasks.append(task)
    plain, validated_too = tasks
    assert_same_state(plain.aug, state_of(validated_too.aug))
    assert plain.net.weight.dtype == {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32}[precision[:-5]]
    twin = Augment("byola-v2", seed=1, n_memory=8)
    for (x, *views), (_, params) in zip(plain.seen, batches * 2, strict=True):
        wanted = twin(x, params=params)
        wanted = (*twin(x), *wanted)
        for a, b in zip(views[:2], wanted[:2], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(views[2:], wanted[2:], strict=True):  # lam and fader came in half precision
            torch.testing.assert_close(a, b, rtol=0, atol={"16": 0.01, "bf16": 0.1, "32": 0}[precision[:-5]])
    assert plain.aug.running_stats.stats()[0].item() == pytest.approx(lms.mean().item(), abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_build_on_meta_and_load(dtype, tmp_path):
    import transformers

    class Config(transformers.PretrainedConfig):
        model_type = "views"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.to_lms = LogMel(n_mels=32)
            self.aug = Augment(seed=1, n_memory=8, shape=(32, 26))
            self.net = nn.Linear(26, 4)
            self.post_init()

    wav = 0.1 * torch.randn(4, 4000)
    original = Model(Config())
    original.aug(original.to_lms(wav))
    original.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path, dtype=dtype).train()
    assert loaded.net.weight.dtype == dtype
    built = Model._from_config(Config(), dtype=dtype)  # under another default dtype
    lms = original.to_lms(wav)
    assert torch.equal(loaded.to_lms(wav), lms)
    assert torch.equal(built.to_lms(wav), lms)
    for a, b in zip(loaded.aug(lms), original.aug(lms), strict=True):
        assert torch.equal(a, b)
    twin = Augment(seed=1, n_memory=8)
    for _ in range(2):
        for a, b in zip(built.aug(lms), twin(lms), strict=True):
            assert torch.equal(a, b)
