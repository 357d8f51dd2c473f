"""Concurrent threads and processes get the results of a single one."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from helpers.layouts import threads
from torch.utils.data import DataLoader, Dataset

from byola_fast import LogMel, augment, ops

THREADS, CALLS = 6, 4
# a spawned process takes seconds to import torch
METHODS = ["fork", "spawn"] if "BYOLA_FAST_FUZZ" in os.environ else ["fork"]


def one(number: int) -> torch.Tensor:
    """Waveform to two views; sizes differ with ``number``, so that caches fill and scratch memory grows."""
    generator = torch.Generator().manual_seed(number)
    wav = 0.1 * torch.randn(3 + number % 3, 3000 + 400 * number, generator=generator)
    lms = LogMel(n_fft=256 << number % 3, win_length=256, n_mels=20, hop_length=80 + number)(wav)
    views = torch.stack(augment(lms, seed=number, interpolation=("bilinear", "bicubic")[number % 2]))
    target = [torch.zeros_like(views)]
    ops.ema_update_(target, [views], 0.9)
    return target[0]


class Views(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, number: int) -> torch.Tensor:
        return one(number)


@pytest.mark.parametrize("inner", [1, 2])
def test_many_python_threads(inner):
    with threads(inner):
        expected = [one(number) for number in range(THREADS)]
        answers: dict[tuple[int, int], torch.Tensor] = {}
        start = threading.Barrier(THREADS)

        def work(number: int) -> None:
            torch.set_num_threads(inner)  # OpenMP counts per Python thread
            start.wait()
            for call in range(CALLS):
                answers[number, call] = one(number)

        running = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    assert len(answers) == THREADS * CALLS
    assert all(torch.equal(answer, expected[number]) for (number, _call), answer in answers.items())


@pytest.mark.parametrize("method", METHODS)
def test_workers_of_a_dataloader_after_threads_in_the_parent(method):
    """A forked child inherits OpenMP state but no threads; kernels must not wait for those threads."""
    with threads(2):
        expected = [one(number) for number in range(6)]
        torch.randn(512, 512) @ torch.randn(512, 512)  # starts the OpenMP threads of torch's libraries
        loader = DataLoader(Views(), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=120)
        found = list(loader)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
