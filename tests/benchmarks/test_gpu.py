"""The program for a machine with a GPU, run small on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jobs.benchmark import main
from pharmacist_ray.benchmarks.gpu import WORKS, Trial, measure
from pharmacist_ray.errors import ConfigError, ResourceError

BARE = """
import sys
sys.modules.update(dict.fromkeys(("ray", "deepspeed", "datasets")))
from jobs.benchmark import main
main(sys.argv[1:])
"""
"""The program on a machine that has PyTorch, transformers and PEFT, but neither Ray nor DeepSpeed."""


def test_it_measures_small_on_a_cpu_and_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["gpu", "--tiny", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [(one["shape"], one["work"], one["why"]) for one in result["gpu"]] == [("tiny", work, "") for work in WORKS]
    for one in result["gpu"]:
        assert one["tokens_per_second"] == pytest.approx(one["rows"] * one["length"] / one["seconds"])
        assert one["estimate_gib"] == pytest.approx(sum(one["items"].values()))
        assert one["mfu"] is None  # whose peak is not known
        assert one["peak_gib"] is None
    assert result["trial"]["dtype"] == "bfloat16"
    assert result["machine"]["gpu"] is None
    assert result["machine"]["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    out = capsys.readouterr().out
    assert "lora, recomputed" in out
    assert f"written to {tmp_path / 'gpu.json'}" in out.replace("\n", "")


@pytest.mark.slow
def test_it_needs_neither_ray_nor_deepspeed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BARE, "gpu", "--tiny", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gpu.json").is_file()


def test_what_there_is_no_time_for_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = measure(Trial(shapes=["tiny"], device="cpu", length=8, rows=2, budget_s=-1.0))
    assert {one.why for one in found} == {"no time left"}
    assert capsys.readouterr().out.count("no time left") == len(WORKS)


def test_a_machine_without_a_gpu_and_a_shape_that_is_none_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ResourceError, match=r"^no GPU that PyTorch can use is here; --tiny --device cpu runs the same program small$"
    ):
        measure(Trial())
    with pytest.raises(ConfigError, match=r"^unknown shape '7B'.*; known: 1B, 8B, tiny$"):
        measure(Trial(shapes=["7B"]))
