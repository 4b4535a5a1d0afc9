"""Machines that go away: a cluster of a head without CPUs and two nodes, here on one machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.faults.disturb import World, command, processes, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    for name in ("period_ms", "failure_threshold", "initial_delay_ms"):  # a node is missed after seconds instead of half a minute
        monkeypatch.setenv(f"RAY_health_check_{name}", "3" if name == "failure_threshold" else "1000")
    # Ray makes this process speak to the new cluster's store, and to none when that ends; the session's own Ray needs it back.
    monkeypatch.setattr("ray.experimental.internal_kv.global_gcs_client", None)
    small: dict[str, Any] = {"object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=3, **small)
        yield cluster
    finally:
        cluster.shutdown()


def node_of(cluster: Cluster, worker: psutil.Process) -> Any:
    """Return the node whose raylet started a worker."""
    above = {process.pid for process in worker.parents()}
    (node,) = (node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.pid in above)
    return node


def lose_node_with(cluster: Cluster, name: str) -> bool:
    """Kill the node on which a worker of a name runs; return whether there was one."""
    workers = processes(name)
    if workers:
        cluster.remove_node(node_of(cluster, workers[0]), allow_graceful=False)
    return bool(workers)


def test_a_node_lost_while_scoring_and_another_while_training(aligned: World, cluster: Cluster, tmp_path: Path) -> None:
    world = aligned.copy(tmp_path / "run", "ingest", "fit")
    with command(world, "run", RAY_ADDRESS=cluster.address) as process:
        wait_for(lambda: world.scored() >= 3, process)
        assert lose_node_with(cluster, "ShardScorer")
        at = world.scored()
        cluster.add_node(num_cpus=3, object_store_memory=100_000_000)
        wait_for(lambda: world.step() >= 20, process)
        assert lose_node_with(cluster, "RayTrainWorker")
        step = world.step()
        out = process.communicate(timeout=150)[0]
    assert (at < 24, step < 110) == (True, True), "too late to be a fault"
    assert process.returncode == 0, out
    assert re.search(r"score: a worker died over part-000\d\d\.parquet; it was scored again \(attempt 2\)", out)
    assert re.search(r"was interrupted; it goes on after step \d+ of 120 \(attempt 2\)", out)
    assert world.scores() == aligned.scores()
    assert world.selected() == aligned.selected()
    assert world.adapter() == aligned.adapter()
    assert world.history() == aligned.history()
    assert world.litter() == []
