"""The network that a worker group talks over: the one that Ray has found.

Gloo takes the address that a machine's own name has. On Debian and Ubuntu that is 127.0.1.1 (`/etc/hosts`), where no other machine is.
NCCL looks for itself. A module of its own, for Ray Train's controller has to import it.
"""

from __future__ import annotations

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig


def use_rays_network() -> None:
    """Have gloo take the interface with the address by which Ray knows this machine, unless ``GLOO_SOCKET_IFNAME`` names one."""
    address = ray.util.get_node_ip_address()
    for name, found in psutil.net_if_addrs().items():
        if address in [one.address for one in found]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]  # Ray has no types
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_rays_network)
        super().on_start(worker_group, backend_config)


class GroupConfig(TorchConfig):  # type: ignore[misc]
    """Torch's process group, over Ray's network."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """What Ray Train calls before the workers meet."""
        return _Backend
