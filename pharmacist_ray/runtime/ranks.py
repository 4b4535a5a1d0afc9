"""The data-parallel workers of one run, as seen from one of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Who I am, how many we are, and where I compute."""

    rank: int
    workers: int
    device: torch.device
    set_status: Callable[[str], None] = lambda what: None
    """Says what the group is about to do, to whoever asks if it never says anything again."""

    @property
    def first(self) -> bool:
        """Whether this worker writes files."""
        return self.rank == 0

    def mean(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the mean of each tensor over the workers."""
        out = [tensor.detach().clone() for tensor in tensors]
        if self.workers > 1:
            for tensor in out:
                dist.all_reduce(tensor)
                tensor /= self.workers
        return out

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the workers."""
        out = tensor.detach().clone()
        if self.workers > 1:
            dist.all_reduce(out)
        return out

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the workers' tensors of equal shape, concatenated in rank order."""
        if self.workers == 1:
            return tensor.detach()
        parts = [torch.empty_like(tensor) for _ in range(self.workers)]
        dist.all_gather(parts, tensor.detach().contiguous())
        return torch.cat(parts)

    def share(self, value: T) -> T:
        """Return the first worker's value, a small picklable one, on every worker."""
        if self.workers == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def of_each(self, value: T) -> list[T]:
        """Return what each worker brings, a small picklable value, in rank order."""
        if self.workers == 1:
            return [value]
        values: list[T] = [value] * self.workers
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every worker is here."""
        if self.workers > 1:
            dist.barrier()


_ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
_before: dict[str, str | None] = {}
# What these variables were in this process before `stay_on_cpu`, once it was called.


def stay_on_cpu() -> None:
    """Let libraries compute on the CPU in this process, whatever GPUs the machine has: DeepSpeed and PEFT take any that they see."""
    for name in _ON_CPU:
        _before.setdefault(name, os.environ.get(name))
    os.environ |= _ON_CPU
    if "deepspeed" in sys.modules:  # has chosen when it was imported
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())


@contextmanager
def gpus_in_sight() -> Iterator[None]:
    """Let what is started in the block know of the GPUs that `stay_on_cpu` hid from this process: a Ray that gives them to workers."""
    hidden = {name: os.environ.pop(name, None) for name in _before}
    os.environ |= {name: value for name, value in _before.items() if value is not None}
    try:
        yield
    finally:
        os.environ |= {name: value for name, value in hidden.items() if value is not None}


def current_ranks() -> Ranks:
    """Return this process's place in the process group, making a group of one where there is none.

    DeepSpeed needs a process group even for one worker; outside Ray Train (unit tests, a notebook) a gloo group of one is made, which
    opens no port beyond loopback and leaves no file.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))  # type: ignore[attr-defined]
    local = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed insists on it
    device = torch.device("cuda", local) if torch.cuda.is_available() and dist.get_backend() == "nccl" else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)
