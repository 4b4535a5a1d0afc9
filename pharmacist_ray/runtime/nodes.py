"""The nodes of a cluster that is there, by what Ray says they have."""

from __future__ import annotations

import os

import ray

from pharmacist_ray.errors import ResourceError


def resources_of_nodes() -> list[dict[str, float]]:
    """Return the resources of each node that is alive of the cluster that ``RAY_ADDRESS`` names, by Ray's names.

    Raises:
        ResourceError: The variable is unset, or no cluster answers there.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise ResourceError(
            "--cluster connected asks the cluster at RAY_ADDRESS, which is unset; set it, or write what there is: 16xH100"
        )
    opened = not ray.is_initialized()
    try:
        if opened:
            ray.init(logging_level="ERROR", log_to_driver=False)
        return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    except (ConnectionError, RuntimeError) as error:
        raise ResourceError(
            f"no Ray cluster answers at RAY_ADDRESS={address}; start it, or write what there is: 16xH100"
        ) from error
    finally:
        if opened and ray.is_initialized():
            ray.shutdown()
