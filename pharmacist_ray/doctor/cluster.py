"""The GPUs of a cluster by node, from what somebody writes (``2x8xA100-40``) or from what Ray says of its nodes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pharmacist_ray.doctor.gpus import GPUS, LIKE, Gpu, gpu_of, recognised
from pharmacist_ray.errors import ConfigError, ResourceError

FORM = "[NODES x] GPUS x KIND, several joined by a comma, for example 16xH100, 2x8xA100-40 or 8xH100,4xL40S"


@dataclass(frozen=True)
class Nodes:
    """Nodes that are alike."""

    count: int
    gpus: int
    """GPUs of each."""
    kind: str
    """A key of `GPUS`."""
    cpus: float | None = None
    """CPUs of each; None where nobody said."""
    memory: float | None = None
    """Bytes of CPU memory of each; None where nobody said."""
    adapters: float | None = None
    """Bits/s of each one's network; None: as clouds have it."""

    @property
    def gpu(self) -> Gpu:
        """What is known of its GPUs."""
        return GPUS[self.kind]

    @property
    def network(self) -> float:
        """Bits/s between nodes: as somebody said, else what clouds give to nodes with eight, in proportion."""
        return self.gpu.network * self.gpus / 8 if self.adapters is None else self.adapters

    @property
    def all_gpus(self) -> int:
        """GPUs of all of them."""
        return self.count * self.gpus

    @property
    def name(self) -> str:
        """As it is written."""
        return f"{self.count}x{self.gpus}x{self.kind}"


Cluster = tuple[Nodes, ...]


def parse_cluster(text: str, network: float | None = None) -> tuple[Cluster, list[str]]:
    """Return the nodes that somebody wrote, and what was taken for granted, in words.

    A number of GPUs without nodes is one node up to eight, and nodes of eight, four, two or one above it.

    Args:
        text: Of the `FORM`.
        network: Bits/s of each node's network, where somebody says.

    Raises:
        ConfigError: It is not of the `FORM`, or names no known GPU.
    """
    found, said = list[Nodes](), list[str]()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?(?:(\d+)\s*x\s*)?([A-Za-z][\w-]*)\s*", part)
        if not match or any(number is not None and not int(number) for number in match.groups()[:2]):
            raise ConfigError(f"--cluster {text}: '{part.strip()}' is not of the form {FORM}")
        first, second, name = match.groups()
        kind, _ = gpu_of(name)
        if name.upper() in LIKE:
            said.append(f"{name} is taken for {kind}; write {', '.join(key for key in GPUS if key.startswith(name.upper()))}")
        if second:
            nodes = Nodes(int(first), int(second), kind)
        else:
            gpus = int(first or 1)
            each = gpus if gpus <= 8 else next(size for size in (8, 4, 2, 1) if gpus % size == 0)
            nodes = Nodes(gpus // each, each, kind)
            if nodes.count > 1:
                said.append(f"{gpus} GPUs are taken for {nodes.count} nodes of {each}; write {nodes.name} for others")
        found.append(nodes)
    return tuple(replace(one, adapters=network) for one in found), said


def cluster_of(nodes: Sequence[Mapping[str, float]], network: float | None = None) -> tuple[Cluster, list[str]]:
    """Return the nodes with GPUs of a cluster that is there, and what was taken for granted, in words.

    Args:
        nodes: Ray's resources of each node that is alive.
        network: Bits/s of each node's network, where somebody says.

    Raises:
        ResourceError: No node has a GPU, or one has a kind that is not in the table.
    """
    counted: Counter[Nodes] = Counter()
    said: dict[str, None] = {}
    for one in nodes:
        if not one.get("GPU"):
            continue
        names = [name.removeprefix("accelerator_type:") for name in one if name.startswith("accelerator_type:")]
        kind = next((found for name in names if (found := recognised(name))), None)
        if kind is None:
            raise ResourceError(
                f"a node's GPUs are of a kind that is not known here ({', '.join(names) or 'Ray says none'}); say what they are like "
                f"by --cluster; known: {', '.join(GPUS)}"
            )
        if any(name.upper() in LIKE for name in names):
            said[f"{kind[:4]}s are taken for {kind}, the smaller ones; --cluster says it if they are not"] = None
        counted[Nodes(1, int(one["GPU"]), kind, one.get("CPU"), one.get("memory"), network)] += 1
    if not counted:
        raise ResourceError("the cluster has no node with a GPU; if they come on demand, say by --cluster what will come")
    return tuple(replace(one, count=count) for one, count in counted.items()), list(said)
