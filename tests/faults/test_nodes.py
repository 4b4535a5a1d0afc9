"""Machines that go away: a cluster of a head without CPUs and two nodes, here on one machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.faults.disturb import World, command, kill_one, wait_for


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


def lose_node_of(cluster: Cluster, worker: psutil.Process) -> None:
    """Kill a node with its raylet, and the worker, which would outlive it for a moment."""
    cluster.remove_node(node_of(cluster, worker), allow_graceful=False)
    with suppress(psutil.NoSuchProcess):  # it did not, which must not look as if the node were still there
        worker.kill()


def test_a_node_lost_while_scoring(calm: World, cluster: Cluster, tmp_path: Path) -> None:
    world = calm.copy(tmp_path / "run", "ingest", "fit")
    with command(world, "score", RAY_ADDRESS=cluster.address) as process:
        wait_for(kill_one("ShardScorer", lambda: world.scoring(3, 19), partial(lose_node_of, cluster)), process)
        out = process.communicate(timeout=150)[0]
    assert process.returncode == 0, out
    assert re.search(r"score: a worker died over part-000\d\d\.parquet; it was scored again \(attempt 2\)", out)
    assert world.scores() == calm.scores()
    assert world.litter() == []


@pytest.mark.slow
def test_a_node_lost_while_scoring_and_another_while_training(aligned: World, cluster: Cluster, tmp_path: Path) -> None:
    world, lose = aligned.copy(tmp_path / "run", "ingest", "fit"), partial(lose_node_of, cluster)
    with command(world, "run", RAY_ADDRESS=cluster.address) as process:
        wait_for(kill_one("ShardScorer", lambda: world.scoring(3, 19), lose), process)
        cluster.add_node(num_cpus=3, object_store_memory=100_000_000)
        wait_for(kill_one("RayTrainWorker", lambda: 20 <= world.step() < 100, lose), process)
        out = process.communicate(timeout=150)[0]
    assert process.returncode == 0, out
    assert re.search(r"score: a worker died over part-000\d\d\.parquet; it was scored again \(attempt 2\)", out)
    assert re.search(r"was interrupted; it goes on after step \d+ of 120 \(attempt 2\)", out)
    assert world.scores() == aligned.scores()
    assert world.selected() == aligned.selected()
    assert world.adapter() == aligned.adapter()
    assert world.history() == aligned.history()
    assert world.litter() == []
