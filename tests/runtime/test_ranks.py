"""Where a worker computes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SEEN = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.distributed.is_nccl_available = lambda: True
{before}
from pharmacist_ray.runtime.ranks import current_ranks, stay_on_cpu
{stay}
from deepspeed.accelerator import get_accelerator
print(get_accelerator().device_name(), current_ranks().device)
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", ["", "import deepspeed"], ids=["before DeepSpeed is imported", "after"])
def test_no_gpu_of_the_machine_is_touched_where_none_is_asked_for(before):
    def device(stay: str) -> str:
        code = SEEN.format(before=before, stay=stay)
        variables = {name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    assert device("") == "cuda cpu"  # what DeepSpeed does by itself
    assert device("stay_on_cpu()") == "cpu cpu"
