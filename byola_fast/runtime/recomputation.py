"""Activation checkpointing (torch.utils.checkpoint), whose backward pass runs a part of the forward pass again.

A module with a state must then do what it did before, and leave its state as it is. Each call in a checkpointed part
leaves a record with the checkpoint, which lives as long as its graph. When a backward pass runs the part again, its
calls take their records in the same order.
"""

from __future__ import annotations

import sys
from types import FrameType, GeneratorType
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

FORWARD, BACKWARD = CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__  # use_reentrant=True


def is_recomputed() -> bool:
    """Return whether a backward pass runs this code."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def refuse_recomputation(name: str) -> None:
    """Refuse to change a state for a second time.

    Raises:
        RuntimeError: a backward pass runs this code.
    """
    if is_recomputed():
        raise RuntimeError(f"{name}: called by a backward pass (activation checkpointing), which must change no state")


def is_outside() -> bool:
    """Return whether this code is in no checkpointed part and in no backward pass; not for compiled code."""
    if torch._C._current_graph_task_id() != -1:
        return False
    return (torch.is_grad_enabled() and not _is_hooked()) or _checkpoints(sys._getframe()) == ([], None)


def recall(module: object) -> tuple[Any, list[Any]]:
    """Return the record of the call that a backward pass runs again, or None; and the checkpoints around this call.

    Raises:
        RuntimeError: a backward pass runs this code, and there is no record.
    """
    if torch.compiler.is_compiling():
        if _traced_in_checkpoint():  # without fullgraph, Python then runs this part
            raise RuntimeError("checkpoint: compiled code keeps no record for it")
        module.__dict__["_traced"] = True  # a side effect, which torch.compile refuses inside a checkpoint likewise
        return None, []
    task = torch._C._current_graph_task_id()
    if task == -1 and torch.is_grad_enabled() and not _is_hooked():
        return None, []
    around, again = _checkpoints(sys._getframe())
    if task == -1 and again is None:
        return None, around
    held = {} if again is None else vars(again)
    records, taken = held.get("byola_fast_records", []), held.get("byola_fast_taken", {})
    number = taken.get(task, 0)
    if number >= len(records) or records[number][0] is not module:
        raise RuntimeError(
            f"{type(module).__name__}: called by a backward pass (activation checkpointing) without a record of its "
            "forward pass; use torch.utils.checkpoint.checkpoint, or call it outside the checkpointed part"
        )
    taken[task] = number + 1
    remember(module, records[number][1], around)
    return records[number][1], around


def _is_hooked() -> bool:
    """Return whether saved tensors pass through hooks, as use_reentrant=False makes them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def remember(module: object, record: object, around: list[Any]) -> None:
    """Leave a record of a call with the checkpoints around it."""
    for checkpoint in around:
        held = vars(checkpoint)
        held.setdefault("byola_fast_records", []).append((module, record))
        held.setdefault("byola_fast_taken", {})  # by backward pass


def _traced_in_checkpoint() -> bool:
    return _checkpoints(sys._getframe()) != ([], None)


# as torch.compiler.assume_constant_result does, which would import the compiler
_traced_in_checkpoint._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _checkpoints(frame: FrameType | None) -> tuple[list[Any], Any]:
    """Return the checkpoints whose forward pass runs this code, and the one that a backward pass runs again."""
    around: list[Any] = []
    while frame is not None:
        code = frame.f_code
        if code.co_filename == FORWARD.co_filename:
            held = frame.f_locals
            if code is FORWARD:
                around.append(held["ctx"])
            elif code is BACKWARD:
                return around, held["ctx"]
            elif code.co_name == "unpack_hook":  # use_reentrant=False
                return around, held["frame"]
            elif isinstance(steps := held.get("gen"), GeneratorType) and steps.gi_frame is not None:
                around.append(steps.gi_frame.f_locals["new_frame"])
        frame = frame.f_back
    return around, None
