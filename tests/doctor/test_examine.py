from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import LlamaConfig

from pharmacist_ray.data.schema import Row
from pharmacist_ray.doctor.examine import examine
from pharmacist_ray.errors import ConfigError, DataError, ModelError, ResourceError


@pytest.fixture
def file(model_folder: Path, rows_of: Callable[..., list[Row]], tmp_path: Path) -> Path:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(row.raw + "\n" for row in rows_of(3)))
    source = {"path": str(data)}
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model_folder)},
        "data": {"candidates": source, "validation": source, "harmful": source, "benign": source},
        "attacks": [{"name": "weak", "task": source, "harmful": source}],
        "comparison": {"selections": ["all", "random"], "seeds": [0, 1]},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    return tmp_path / "run.yaml"


def change(file: Path, section: str, **values: object) -> None:
    old = yaml.safe_load(file.read_text())
    old.setdefault(section, {}).update(values)
    file.write_text(json.dumps(old))


def test_without_a_file_it_names_the_machine_the_packages_and_the_choices(capsys):
    examine(None)
    out = capsys.readouterr().out
    for word in (
        "CPU cores",
        "GiB memory",
        f"torch {torch.__version__}",
        "pharmacist            model, candidates, validation, harmful",
        "keyword               nothing",
        "sft",
        "phrases, withheld, classifier, generative, endpoint, testbed",
        "RAY_ADDRESS=",
    ):
        assert word in out
    assert "plan" not in out


def test_gpus_that_the_build_cannot_use_are_a_warning(capsys, monkeypatch, large):
    def properties(index: int) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update")

    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", properties)
    examine(None)
    out = capsys.readouterr().out
    assert "cannot use: The NVIDIA driver on your system is too old (found version 12020). Please update" in " ".join(out.split())
    assert "version 580 or newer" in out
    assert "no GPU: tiny models only" in out
    with pytest.raises(ResourceError, match="this machine has no GPU"):
        examine(large)
    assert "does not fit a GPU of 141 GiB" in capsys.readouterr().out


def test_a_good_file_gets_a_plan_and_nothing_is_written(file, capsys):
    examine(file)
    out = capsys.readouterr().out
    assert "8 aligned models (4 selections × 2 seeds), 8 attacked ones; 1 training runs of 1 workers at a time" in out
    assert "ingest: to be made" in out
    assert out.endswith("this configuration can run\n")
    assert not (file.parent / "run").exists()


def test_every_problem_is_told_and_the_last_one_is_the_exit(file, capsys):
    change(file, "data", candidates={"path": "/none/a.jsonl"}, validation={"path": "/none/[b].jsonl"})
    change(file, "model", path="/none/model")
    change(file, "alignment", objective="sfd")
    with pytest.raises(DataError, match=r"/none/\[b\].jsonl"):
        examine(file)
    out = capsys.readouterr().out
    assert "unknown objective 'sfd' (did you mean 'sft'?)" in out
    assert "/none/model" in out
    assert "/none/a.jsonl" in out
    assert "can run" not in out


def test_a_rule_that_makes_no_sense_and_a_judge_without_its_model_are_found_now(file):
    change(file, "selection", ratio=None, threshold=0.5, quotas={"a": 0.5})
    with pytest.raises(ConfigError, match=r"selection\.quotas are shares of a known number of rows"):
        examine(file)
    change(file, "selection", quotas={}, threshold=float("nan"))
    with pytest.raises(ConfigError, match=r"selection\.threshold must be a finite number"):
        examine(file)
    change(file, "selection", threshold=0.5)
    data = {"path": str(file.parent / "data.jsonl")}
    change(file, "evaluation", harmful_prompts=data, benign_prompts=data, task={"source": data}, judge="classifier")
    with pytest.raises(ConfigError, match=r"judge 'classifier' needs evaluation\.judge_path"):
        examine(file)
    change(file, "evaluation", judge="phrasez")
    with pytest.raises(ConfigError, match=r"unknown judge 'phrasez' \(did you mean 'phrases'\?\)"):
        examine(file)


def test_a_model_without_end_and_a_machine_without_gpus_are_told(file, tmp_path, tokenizer, monkeypatch):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    change(file, "model", path=str(tmp_path / "endless"))
    with pytest.raises(ModelError, match="the tokenizer has no end-of-sequence token, so no answer could ever end"):
        examine(file)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    change(file, "resources", gpus_per_worker=1)
    with pytest.raises(ResourceError, match="this machine has no GPU and RAY_ADDRESS is unset"):
        examine(file)


def test_what_training_takes_is_told_for_every_run(file, capsys):
    change(file, "comparison", defences=["booster", "vaccine"])
    examine(file)
    out = capsys.readouterr().out
    assert "model    11,640 parameters in 2 layers; the adapter has 5,760" in out
    memory = [line.split(",")[0].removeprefix("memory   ") for line in out.splitlines() if line.startswith("memory   ")]
    assert memory == [
        "alignment.train (booster)",
        "alignment.train (vaccine)",
        "selector.warmup (sft)",
        "selector.reference (sft)",
        "attacks.0.train (sft)",
        "fit: directions",
        "score",
    ]
    assert "          base weights                 45.5 KiB  11640 weights × 4 B\n" in out
    assert out.count("base weights  ") == 4  # alignment and warm-up, directions and scoring, item by item
    assert "          adapters of the selector     45.0 KiB  2 adapters × 5760 weights × 4 B\n" in out
    assert "          back-up of weights           22.5 KiB  1 copies × 5760 weights × 4 B\n" in out
    assert "for all workers" in out
    assert "time  " not in out  # no estimate for a CPU


@pytest.fixture
def large(file: Path, tokenizer, tmp_path: Path) -> Path:
    """A run on the shape of Llama-3-70B, which has no weights anywhere."""
    config = LlamaConfig(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672,
        vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    change(file, "model", path=str(tmp_path / "large"), dtype="bfloat16", max_length=512)
    change(file, "resources", workers=16, gpus_per_worker=1)
    sharded = {"batch_size": 64, "zero_stage": 3, "checkpointing": True, "offload": "optimizer"}
    change(file, "selector", warmup=sharded | {"steps": 20}, reference=sharded)
    change(file, "alignment", objective="t_vaccine", train=sharded | {"steps": 500})
    values = yaml.safe_load(file.read_text())
    values["attacks"] = []
    file.write_text(json.dumps(values))
    return file


def test_a_large_model_is_costed_without_its_weights(large, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ResourceError, match="this machine has no GPU"):
        examine(large)
    out = capsys.readouterr().out
    assert "model    70,553,706,496 parameters in 80 layers; the adapter has 103,546,880" in out
    assert "base weights                  8.2 GiB  70.55e9 weights × 2 B / 16 GPUs\n" in out
    assert "AdamW's two moments          49.4 MiB  103.5e6 weights × 8 B / 16 GPUs (CPU memory)\n" in out
    assert "; fits a GPU of 40 GiB\n          and 98.8 MiB of CPU memory, per worker as well\n" in out
    assert "500 steps in" in out
    assert "on H100s" in out
    block = out[out.index("model    70") : out.rindex("assumed")]
    assert max(map(len, block.splitlines())) <= 100


def test_what_does_not_fit_comes_with_what_to_change(large, capsys, monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA A100-SXM4-80GB", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    examine(large)
    out = capsys.readouterr().out
    assert " of 80.0 GiB on NVIDIA A100-SXM4-80GB\n" in out
    assert "on A100-80s" in out
    trainings, _, others = out.partition("memory   fit: directions")
    assert "too much" not in trainings
    # Scoring's; directions are taken where the warm-up is sharded.
    assert others.count("too much: all weights are held by one, which takes 131.4 GiB; take larger GPUs") == 1
    train = {"batch_size": 64, "checkpointing": True}
    change(large, "alignment", train=train)
    examine(large)
    out = capsys.readouterr().out
    assert "          too much: accumulation=4 (micro-batch 1), zero_stage=3 would bring it to " in out
    assert "still too much" not in out
    change(large, "resources", gpus_per_worker=0.1)
    examine(large)
    out = capsys.readouterr().out
    assert " of 8.0 GiB on NVIDIA A100-SXM4-80GB\n" in out
    assert "          and that is still too much: take more or larger GPUs, or a smaller model.max_length\n" in out


def test_a_gpu_that_nobody_asked_for_is_told(file, capsys, monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    line = "warning  this machine has 1 GPU and none is asked for: all is computed on the CPU; set resources.gpus_per_worker=1"
    examine(file)
    assert line in capsys.readouterr().out
    change(file, "resources", gpus_per_worker=1)
    examine(file)
    assert line not in capsys.readouterr().out


def test_lora_targets_that_the_model_lacks_are_found_now(file):
    change(file, "model", lora={"targets": ["qproj"]})
    with pytest.raises(ModelError, match=r"no linear module for LoRA targets \['qproj'\]"):
        examine(file)
