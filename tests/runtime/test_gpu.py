"""The same on a GPU as on the CPU: gradients of samples, and a whole run by every objective and every ZeRO stage."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from pharmacist_ray.api import align, score
from pharmacist_ray.config.load import load_config
from pharmacist_ray.config.model import LoraConfig
from pharmacist_ray.models.influence import influence
from pharmacist_ray.models.load import add_lora
from pharmacist_ray.pipeline.session import run_stage
from pharmacist_ray.training.objectives import ALIGNING
from tests.search.test_search import write_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use is here"),
]


@pytest.mark.parametrize("method", ["hooks", "ghost", "difference"])
def test_influence_is_the_cpus(tiny, batch_of, method):
    model, batch = add_lora(tiny(), LoraConfig(r=2), seed=0), batch_of(6)
    generator = torch.Generator().manual_seed(0)
    directions = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape, generator=generator) / 4  # B begins at zero
            directions[name] = torch.randn((2, *weight.shape), generator=generator)
    expected = influence(model, batch, directions, method=method)
    there = {name: direction.cuda() for name, direction in directions.items()}
    found = influence(model.cuda(), batch.to(torch.device("cuda")), there, method=method)
    assert found.dots.is_cuda
    torch.testing.assert_close(found.losses.cpu(), expected.losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.dots.cpu(), expected.dots, rtol=1e-2 if method == "difference" else 1e-3, atol=1e-3)


ON_GPU = "resources={workers: 1, actors: 1, gpus_per_worker: 1, cpus_per_worker: 1}"


def test_a_whole_run_is_the_cpus(model_folder, rows_of, tmp_path):
    """All stages by all objectives, in float32: scores and losses agree, and the manifests hold what the GPU had allocated."""
    file = write_config(tmp_path, model_folder, rows_of)
    settings = [
        "comparison.selections=[all]", f"comparison.defences=[{', '.join(ALIGNING)}]", "scoring.scorers=[pharmacist, less]",
        "alignment.parameters={t_vaccine: {layers: 1, interval: 1, probe_interval: 1}}",
    ]  # fmt: skip
    scores, made = {}, {}
    for name, resources in {"cpu": "resources={workers: 0, actors: 0}", "gpu": ON_GPU}.items():
        config = load_config(file, [*settings, resources, f"run_dir={tmp_path / name}"])
        run_stage("run", config)
        scores[name] = score(config).to_pandas().sort_values("id")
        manifests = (json.loads(one.read_text()) for one in (tmp_path / name).rglob("manifest.json"))
        made[name] = {one["summary"]["name"]: one["summary"] for one in manifests if one["stage"] == "align"}
    assert len(made["gpu"]) == len(ALIGNING)
    for name, summary in made["gpu"].items():  # some draw their noise where they compute
        assert summary["final_loss"] == pytest.approx(made["cpu"][name]["final_loss"], rel=2e-2), name
        assert 0 < summary["peak_bytes"] < 2**26, name
    assert list(scores["gpu"].id) == list(scores["cpu"].id)
    for column in ("pharmacist", "less"):
        assert scores["gpu"][column].to_numpy() == pytest.approx(scores["cpu"][column].to_numpy(), rel=2e-2, abs=1e-4)


def test_every_zero_stage_trains_in_bfloat16(model_folder, rows_of, tmp_path):
    """Adapters at all stages; full weights need float32 masters, which begin with ZeRO 1."""
    file = write_config(tmp_path, model_folder, rows_of)
    for weights, stage in itertools.product(("lora", "full"), range(4)):
        if (weights, stage) != ("full", 0):
            settings = [
                f"alignment.train.zero_stage={stage}",
                f"alignment.train.weights={weights}",
                "comparison.selections=[all]",
            ]
            assert list(align(load_config(file, ["model.dtype=bfloat16", *settings, ON_GPU]))) == ["all.sft.s3"], (weights, stage)
