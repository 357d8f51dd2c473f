"""The Triton kernels on any machine: the ops' tests under Triton's interpreter, in a subprocess.

With a GPU the same tests also run on CUDA, through their ``device`` fixture.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from byola_fast.ops import _triton

TESTS = Path(__file__).parents[1]

# file: expression that selects its tests; gradcheck and sweeps over all draws would take too many launches
DTYPES = "not dtype0 and not dtype2"  # float32 and bfloat16
FILES = {
    "ops/test_triton_kernels.py": "",
    "ops/test_triton_two_views.py": "plain or bicubic or bfloat16 or pool or refused or larger or evaluation or empty",
    "ops/test_triton_ema_update.py": "not graph",
    "ops/test_triton_proof.py": "",
    "ops/test_log_mel.py": "htk and (Nyquist or onset)",
    "ops/test_log_mixup_exp.py": "not gradcheck",
    "ops/test_resize_crop.py": f"not gradcheck and not any_shape and not dtype3 and {DTYPES}",
    "ops/test_augment_views.py": f"not gradcheck and not any_shape and not standard_normal and not linear and {DTYPES}",
    "ops/test_bank_push.py": f"{DTYPES} and not half_precision",  # the interpreter rounds otherwise
    "ops/test_conv_block.py": "not gradcheck and not shape2 and not 1-70 and not 17-16 and not dtype2",
    "ops/test_sums.py": "not gradient",
    "spectrograms/test_statistics.py": "",
    "ops/test_philox.py": "follow_from_the_words",
    "networks/test_encoders.py": "hooks or a_training_step",
    "views/test_augment.py": "replay or out_is_reused or empty or clean_inputs",
    "views/test_replay.py": "",
    "views/test_more_views.py": "(first_two and log) or out_takes or eval_mode or each_group_has",
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(_triton.interpreted(), reason="already under the interpreter")]


@pytest.mark.parametrize("file", FILES)
def test_under_the_interpreter(file):
    environment = os.environ | {"TRITON_INTERPRET": "1", "BYOLA_FAST_STRICT": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS / file)]
    done = subprocess.run(
        [*command, "-k", FILES[file]], env=environment, cwd=TESTS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
