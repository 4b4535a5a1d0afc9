from __future__ import annotations

import os
from pathlib import Path

import psutil
import ray

from pharmacist_ray.config.schema import ResourcesConfig
from pharmacist_ray.runtime.network import use_rays_network
from pharmacist_ray.runtime.workers import run_on_workers


def interface(payload: object, ranks: object) -> tuple[str, str]:
    """Return the interface that a worker's gloo was given, and the address by which Ray knows its machine."""
    return os.environ.get("GLOO_SOCKET_IFNAME", ""), ray.util.get_node_ip_address()


def test_workers_talk_over_the_network_by_which_ray_knows_their_machine(ray_local: None, tmp_path: Path) -> None:
    """Where a machine's name has a loopback address: `tests/cluster/test_slurm_real.py`."""
    resources = ResourcesConfig(workers=2, cpus_per_worker=0.5)
    name, address = run_on_workers(interface, None, name="network", storage=tmp_path, resources=resources)
    assert address in [found.address for found in psutil.net_if_addrs()[name]]


def test_an_interface_that_is_named_stays(monkeypatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    use_rays_network()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
