from __future__ import annotations

import pytest

from pharmacist_ray.doctor.gpus import GPUS, gpu_of, recognised
from pharmacist_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80"), ("NVIDIA A100-SXM4-40GB", "A100-40"), ("A100-80G", "A100-80"), ("A100", "A100-40"),
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA B200", "B200"), ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"), ("NVIDIA A10G", "A10G"), ("Tesla T4", "T4"), ("Tesla V100-SXM2-32GB", "V100-32"), ("V100", "V100-16"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"), ("NVIDIA L40", None), ("NVIDIA GeForce RTX 4080", None), ("AMD MI300X", None),
    ],
)  # fmt: skip
def test_what_cuda_and_ray_call_a_gpu_is_recognised(name: str, kind: str | None) -> None:
    assert recognised(name) == kind


def test_what_somebody_writes_is_one_of_the_table() -> None:
    assert {gpu_of(kind.lower())[0] for kind in GPUS} == set(GPUS)
    assert [gpu_of(name)[0] for name in ("A100", "a100-80GB", "a100_40", "v100")] == ["A100-40", "A100-80", "A100-40", "V100-16"]
    with pytest.raises(
        ConfigError, match=r"unknown GPU 'Foo'; known: A100-40, A100-80, A10G, B200, H100, .*; take one with the same"
    ):
        gpu_of("Foo")
    with pytest.raises(ConfigError, match=r"did you mean 'H100'\?"):
        gpu_of("H10O")


def test_pytorch_sees_less_than_the_name_says_and_no_more_than_a_tenth_less() -> None:
    said = {"B200": 192, "H200": 141, "H100": 80, "A100-80": 80, "A100-40": 40, "L40S": 48, "A10G": 24, "L4": 24, "RTX4090": 24,
            "T4": 16, "V100-32": 32, "V100-16": 16}  # fmt: skip
    for kind, gigabytes in said.items():
        assert 0.9 * gigabytes < GPUS[kind].memory_gib * 1.0 <= gigabytes, kind
        assert GPUS[kind].bfloat16 >= GPUS[kind].float32
