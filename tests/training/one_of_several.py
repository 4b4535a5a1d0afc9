"""One process of several who hold a model together, started by a test that measures their memory: nothing else lives in it."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from pharmacist_ray.runtime.ranks import current_ranks, stay_on_cpu


def private_bytes() -> int:
    """Return the memory of this process that no other shares and no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024


class Watch(threading.Thread):
    """Notes the most that the process has held."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0

    def run(self) -> None:
        while True:
            self.most = max(self.most, private_bytes())
            time.sleep(0.01)


def main(rank: int, workers: int, folder: Path) -> None:
    """Do what `test_sharded.numbers` does, and leave it and the memory that it took beside the rendezvous."""
    stay_on_cpu()
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group-{workers}", rank=rank, world_size=workers)
    from pharmacist_ray.models.ref import ModelRef
    from tests.training.test_sharded import numbers

    assert all((AutoModelForCausalLM, PeftModel, LlamaForCausalLM))  # imported by now, so that this does not count
    before, watch = private_bytes(), Watch()
    watch.start()
    model = ModelRef(str(folder / "model"), template="plain", max_length=32)
    found = numbers((model, str(folder / "adapter"), workers > 1, False), current_ranks())
    (folder / f"memory-{workers}-{rank}.json").write_text(json.dumps(watch.most - before))
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / f"found-{workers}.safetensors")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
