"""How a training step is run and timed: as one CUDA graph where that is possible, stage by stage where asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

WARM_UP_STEPS = 3  # before a capture, so that every kernel is compiled and every buffer is there
UNTIMED_STEPS, TIMED_STEPS = 3, 200

Step = Callable[[Tensor], tuple[Tensor, Tensor]]


def use_graph(asked: bool | None, device: torch.device, *, processes: int, profile: bool) -> bool:
    """Decide whether steps are replayed as one CUDA graph: where nothing speaks against it, unless told otherwise.

    Args:
        asked: None leaves the choice to this function.
        device: that trains.
        processes: that train together.
        profile: whether stages are to be timed.

    Raises:
        ValueError: a graph is asked for where there cannot be one; says why.
    """
    why = None
    if device.type != "cuda":
        why = f"it needs a GPU, and this run is on the {device.type.upper()}"
    elif processes > 1:
        why = "several processes exchange gradients within a step"
    elif profile:
        why = "the stages of a graph cannot be timed"
    if asked and why:
        raise ValueError(f"cuda_graph: expected false or null here, got true: {why}")
    return why is None and asked is not False


def graph_step(step: Step, wav: Tensor, networks: Iterable[nn.Module], optimizer: torch.optim.Optimizer) -> Step:
    """Capture a training step as one CUDA graph and return what replays it.

    The warm-up trains for real, so everything that it moves is put back in place: weights, buffers, the optimiser's
    state and torch's generator. Tensors keep their addresses, which the graph holds.

    Args:
        step: waveforms to (loss, projection); reads no value back from the GPU.
        wav: waveforms of the shape and dtype of every batch to come, on the GPU.
        networks: all modules whose parameters and buffers a step changes.
        optimizer: with ``capturable=True``.

    Returns:
        A step that copies its waveforms into the graph's input; what it returns is overwritten by the next one.
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
    graph = torch.cuda.CUDAGraph()
    # Threads that read ahead pin memory meanwhile, which "global", the default, would take for an error of the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
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
