from __future__ import annotations

import pytest

from pharmacist_ray.errors import ResourceError
from pharmacist_ray.runtime.nodes import resources_of_nodes


def test_the_nodes_of_a_cluster_say_what_they_have(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "here")
    (node,) = resources_of_nodes()
    assert node["CPU"] == 6
    assert node["memory"] > 1e6
    assert "GPU" not in node


def test_without_an_address_there_is_nobody_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ResourceError, match="RAY_ADDRESS, which is unset; set it, or write what there is: 16xH100"):
        resources_of_nodes()
