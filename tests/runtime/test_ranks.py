"""Where a worker computes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pharmacist_ray.runtime import ranks
from pharmacist_ray.runtime.ranks import gpus_in_sight, stay_on_cpu
from tests.search.test_search import write_config

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


def test_a_ray_that_is_started_later_knows_of_the_gpus_that_this_process_does_not_see(monkeypatch):
    """In a notebook, say, a run on the CPU and then one on GPUs."""
    monkeypatch.setattr(ranks, "_before", {})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    stay_on_cpu()
    stay_on_cpu()
    here = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")}
    with gpus_in_sight():
        assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ.get("DS_ACCELERATOR")) == ("1", None)
    assert {name: os.environ.get(name) for name in here} == here == {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


WHOLE = """
import os
import sys
import torch
torch.cuda.device_count = lambda: 0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else 1  # as PyTorch does before it has begun
torch.cuda.is_available = lambda: torch.cuda.device_count() > 0
torch.distributed.is_nccl_available = lambda: True

def touching(name):
    def touched(*_, **__):
        raise AssertionError(f"the GPU was touched: torch.cuda.{name}")
    return touched

torch._C._cuda_getCurrentRawStream = touching("current_stream")  # for bitsandbytes, which PEFT imports: it looks for it, and calls it later

for name in ("init", "_lazy_init", "set_device", "get_device_properties"):
    setattr(torch.cuda, name, touching(name))
moved, to = set(), torch.Tensor.to

def noted(tensor, *arguments, **named):
    moved.update(str(one) for one in (*arguments, *named.values()) if isinstance(one, str | torch.device))
    return to(tensor, *arguments, **named)

torch.Tensor.to = noted
from pharmacist_ray.config.load import load_config
from pharmacist_ray.pipeline.session import run_stage
run_stage("run", load_config(sys.argv[1], ["resources={workers: 0, actors: 0}"]))
from deepspeed.accelerator import get_accelerator
print("moved to", sorted(moved), "DeepSpeed on", get_accelerator().device_name())
"""


@pytest.mark.slow
def test_a_whole_run_touches_nothing_but_the_cpu_where_a_gpu_is_there_and_none_is_asked_for(model_folder, rows_of, tmp_path):
    """The machine says that it has a GPU; whatever initialises it, or moves a tensor there, ends the run."""
    file = write_config(tmp_path, model_folder, rows_of)
    variables = {name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")}
    done = subprocess.run([sys.executable, "-c", WHOLE, str(file)], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "moved to ['cpu'] DeepSpeed on cpu"
    assert (tmp_path / "run" / "evaluation" / "table.json").exists()
