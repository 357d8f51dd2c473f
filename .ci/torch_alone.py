"""Check that byola_fast imports and augments where torch alone is installed.

    PYTHONPATH=. python .ci/torch_alone.py

The kernels need ninja and a compiler: without them a warning names the fallback.
"""

from __future__ import annotations

import importlib.util
import sys

import torch

OTHERS = ("torchaudio", "soundfile", "soxr", "jsonargparse", "rich", "safetensors", "ninja", "pybind11", "pytest")

if installed := [name for name in OTHERS if importlib.util.find_spec(name)]:
    sys.exit(f"expected an environment with torch alone, found {', '.join(installed)}")

before = {name.partition(".")[0] for name in sys.modules}

import byola_fast  # noqa: E402

view1, view2 = byola_fast.augment(torch.randn(4, 64, 96))
assert view1.shape == view2.shape == (4, 64, 96)
assert torch.stack([view1, view2]).isfinite().all()

added = {name.partition(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
assert added == {"byola_fast"}, f"expected no other package, got {sorted(added)}"
print(f"torch {torch.__version__}, byola_fast {byola_fast.__version__}: two views with torch alone")
