"""A training step as one CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

WARM_UP_STEPS = 3  # before a capture, so that every kernel is compiled and every buffer is there

Step = Callable[[Tensor], tuple[Tensor, Tensor]]


def use_graph(asked: bool | None, device: torch.device, *, processes: int, profile: bool, own: bool = False) -> bool:
    """Decide whether steps are replayed as one CUDA graph.

    Args:
        asked: True or False; None takes a graph whenever possible.
        device: that trains.
        processes: number of processes that train together.
        profile: whether the stages of a step are timed.
        own: whether the optimiser is a user's own.

    Raises:
        ValueError: a graph is asked for but impossible; says why.
    """
    why = None
    if device.type != "cuda":
        why = f"it needs a GPU, and this run is on the {device.type.upper()}"
    elif processes > 1:
        why = "several processes exchange gradients within a step"
    elif profile:
        why = "the stages of a graph cannot be timed"
    elif own:
        why = "an optimiser of your own may need the CPU"
    if asked and why:
        raise ValueError(f"cuda_graph: expected false or null here, got true: {why}")
    return why is None and asked is not False


def graph_step(step: Step, wav: Tensor, networks: Iterable[nn.Module], optimizer: torch.optim.Optimizer) -> Step:
    """Capture a training step as one CUDA graph and return what replays it.

    The warm-up really trains, so weights, buffers, the optimiser's state and torch's generator are restored afterwards.
    Tensors keep their addresses, because the graph holds them.

    Args:
        step: waveforms to (loss, projection), without reading any value back from the GPU.
        wav: waveforms on the GPU, with the shape and dtype of every later batch.
        networks: all modules whose parameters and buffers a step changes.
        optimizer: with ``capturable=True``.

    Returns:
        A step that copies its waveforms into the graph's input. The next call overwrites what it returns.
    """
    static = wav.clone()
    held = {id(x): (x, x.detach().clone()) for x in _changed(networks, optimizer)}
    generator = torch.cuda.get_rng_state(wav.device)
    side = torch.cuda.Stream(wav.device)
    side.wait_stream(torch.cuda.current_stream(wav.device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_STEPS):
            step(static)
    torch.cuda.current_stream(wav.device).wait_stream(side)
    gc.collect()  # freeing a tensor of an older graph would break the capture
    graph = torch.cuda.CUDAGraph()
    # On the stream of the warm-up, where autograd accumulates gradients. Threads that read ahead pin memory during the
    # capture; the default mode "global" would call that an error.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        loss, projection = step(static)
    with torch.no_grad():
        for x in _changed(networks, optimizer):
            x.copy_(held[id(x)][1]) if id(x) in held else x.zero_()  # Adam's state begins as zeros
    torch.cuda.set_rng_state(generator, wav.device)

    def replay(wav: Tensor) -> tuple[Tensor, Tensor]:
        static.copy_(wav, non_blocking=True)
        graph.replay()
        return loss, projection

    return replay


def _changed(networks: Iterable[nn.Module], optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for network in networks:
        yield from network.parameters()
        yield from network.buffers()
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
