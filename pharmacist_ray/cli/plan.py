"""``pharmacist doctor --cluster``: plan a run for a cluster, and put the plan into a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pharmacist_ray.config import load_config
from pharmacist_ray.doctor.cluster import cluster_of, parse_cluster
from pharmacist_ray.doctor.planner import show_plan, write_plan
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.pipeline.console import escaped, say

CONNECTED = "connected"
"""In the place of nodes: those of the cluster that RAY_ADDRESS names."""


def plan_run(
    config: Path | None, overrides: Sequence[str], cluster: str, *, write: Path | None, rows: float | None, network: float | None
) -> None:
    """Print the plan of a run for a cluster, and put its layout into a file if that is asked for.

    Args:
        config: The run's file.
        overrides: ``dotted.key=value`` pairs over the file's.
        cluster: Nodes in words, or `CONNECTED`.
        write: A file for the layout; the run's own is changed in place.
        rows: Candidates, where somebody says how many.
        network: Gbit/s of each node's network, where somebody says.

    Raises:
        ConfigError: No file, or nodes that mean nothing.
        ResourceError: The run fits nowhere there.
    """
    if config is None:
        raise ConfigError("--cluster plans a run: give its file by --config; `pharmacist init` writes one")
    given = load_config(config, overrides)
    speed = None if network is None else network * 1e9
    if cluster == CONNECTED:
        from pharmacist_ray.runtime.nodes import resources_of_nodes

        nodes, said = cluster_of(resources_of_nodes(), speed)
    else:
        nodes, said = parse_cluster(cluster, speed)
    layout = show_plan(given, nodes, rows=rows, said=said)
    if write is None:
        say(
            "[dim]--write FILE puts the layout into a copy of the configuration, --write with its own name into the file itself[/]"
        )
        return
    changed = write_plan(layout, load_config(config), config, write)
    what = f"{len(changed)} key{'s' * (len(changed) > 1)} changed ({', '.join(changed)})" if changed else "nothing to change"
    say(f"[green]wrote {escaped(write)}[/]: {escaped(what)}; the other lines and all comments are as they were")
