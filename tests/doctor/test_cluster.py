from __future__ import annotations

import pytest

from pharmacist_ray.doctor.cluster import Nodes, cluster_of, parse_cluster
from pharmacist_ray.errors import ConfigError, ResourceError


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("H100", [Nodes(1, 1, "H100")]),
        ("8xL4", [Nodes(1, 8, "L4")]),
        ("16xH100", [Nodes(2, 8, "H100")]),
        ("12xH200", [Nodes(3, 4, "H200")]),
        ("2x8xA100-40", [Nodes(2, 8, "A100-40")]),
        (" 2 x 8 x h100 , 4xl40s", [Nodes(2, 8, "H100"), Nodes(1, 4, "L40S")]),
    ],
)
def test_nodes_are_read_as_they_are_written(text: str, nodes: list[Nodes]) -> None:
    assert list(parse_cluster(text)[0]) == nodes


def test_what_was_taken_for_granted_is_said() -> None:
    assert parse_cluster("2x8xH100")[1] == []
    assert parse_cluster("16xH100")[1] == ["16 GPUs are taken for 2 nodes of 8; write 2x8xH100 for others"]
    assert parse_cluster("8xA100")[1] == ["A100 is taken for A100-40; write A100-80, A100-40"]


def test_what_is_no_cluster_is_told_in_one_line() -> None:
    for text in ("sixteen", "0xH100", "2x0xH100", "16", "16x", "", "1x2x3xH100"):
        with pytest.raises(ConfigError, match=r"known: A100-40|is not of the form \[NODES x\] GPUS x KIND"):
            parse_cluster(text)
    with pytest.raises(ConfigError, match=r"unknown GPU 'Foo'; known: A100-40, .*V100-32; take one with the same memory or less"):
        parse_cluster("16xFoo")


def test_the_network_is_as_clouds_have_it_or_as_somebody_says() -> None:
    (nodes,), _ = parse_cluster("2x8xH100")
    assert nodes.network == 3200e9
    (nodes,), _ = parse_cluster("2x4xA100-40")
    assert nodes.network == 200e9
    (nodes,), _ = parse_cluster("2x4xA100-40", 100e9)
    assert nodes.network == 100e9


def test_nodes_of_a_cluster_that_is_there_are_counted_by_kind() -> None:
    gpu = {"CPU": 96.0, "GPU": 8.0, "memory": 1e12}
    nodes, said = cluster_of(
        [
            {"CPU": 8.0, "node:head": 1.0},
            gpu | {"accelerator_type:H100": 1.0},
            gpu | {"accelerator_type:H100": 1.0},
            {"CPU": 32.0, "GPU": 4.0, "accelerator_type:A100": 1.0},
        ]
    )
    assert nodes == (Nodes(2, 8, "H100", 96.0, 1e12), Nodes(1, 4, "A100-40", 32.0))
    assert said == ["A100s are taken for A100-40, the smaller ones; --cluster says it if they are not"]
    with pytest.raises(ResourceError, match="no node with a GPU; if they come on demand, say by --cluster what will come"):
        cluster_of([{"CPU": 8.0}])
    with pytest.raises(ResourceError, match=r"not known here \(TPU-V4\); say what they are like by --cluster; known: B200, H200"):
        cluster_of([gpu | {"accelerator_type:TPU-V4": 1.0}])
