from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pharmacist_ray.config.schema import LoraConfig, ResourcesConfig, TrainConfig
from pharmacist_ray.data.rows import iterate_rows, write_rows
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.errors import ConfigError, DataError, ResourceError, TrainingError
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.training import loop, runs
from pharmacist_ray.training.engine import build_engine
from pharmacist_ray.training.loop import run_task
from pharmacist_ray.training.runs import run_tasks, train_all
from pharmacist_ray.training.streams import alignment_stream
from pharmacist_ray.training.task import TrainTask, progress_file
from tests.two_workers import TwoWorkers

TRAIN = TrainConfig(steps=4, batch_size=8, lr=1e-2, weight_decay=0.1)


@pytest.fixture
def task(model_folder: Path, rows_of: Callable[..., list[Row]], tmp_path: Path) -> TrainTask:
    write_rows(rows_of(20), tmp_path / "rows.parquet")
    return TrainTask(
        name="a task",
        out=str(tmp_path / "out"),
        model=ModelRef(str(model_folder), template="plain", max_length=32),
        rows=(str(tmp_path / "rows.parquet"),),
        train=TRAIN,
        seed=5,
        lora=LoraConfig(r=4),
        checkpoints=(2,),
    )


def row_of(prompt: str, response: str) -> Row:
    return Row(row_id(prompt, response), prompt, response)


def _history(task: TrainTask) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(task.out) / "history.jsonl").read_text().splitlines()]


def test_an_adapter_comes_out_that_peft_loads_and_that_has_learnt(task: TrainTask, model_folder: Path) -> None:
    result = run_task(task)
    losses = [step["loss"] for step in _history(task)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert result["rows"] == 20
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), Path(task.out) / "adapter")
    assert any(float(p.abs().max()) > 0 for name, p in model.named_parameters() if "lora_B" in name)
    assert not progress_file(Path(task.out)).exists()


def test_a_kept_checkpoint_is_the_adapter_after_that_step(task: TrainTask, tmp_path: Path) -> None:
    run_task(task)
    short = replace(task, out=str(tmp_path / "short"), train=TRAIN.model_copy(update={"steps": 2}), checkpoints=())
    run_task(short)
    kept = load_file(Path(task.out) / "step-000002" / "adapter_model.safetensors")
    ended = load_file(Path(short.out) / "adapter" / "adapter_model.safetensors")
    assert kept.keys() == ended.keys()
    assert all(torch.equal(kept[name], ended[name]) for name in kept)


def test_the_same_task_gives_the_same_bytes(task: TrainTask, tmp_path: Path) -> None:
    run_task(task)
    run_task(replace(task, out=str(tmp_path / "again")))
    files = [Path(out) / "adapter" / "adapter_model.safetensors" for out in (task.out, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_is_finished_is_not_trained_again(task: TrainTask) -> None:
    first = run_task(task)
    stamp = (Path(task.out) / "history.jsonl").stat().st_mtime_ns
    assert run_task(task) == first
    assert (Path(task.out) / "history.jsonl").stat().st_mtime_ns == stamp


def test_accumulated_micro_batches_give_the_same_curve_as_one_batch(task: TrainTask, tmp_path: Path) -> None:
    run_task(task)
    split = replace(task, out=str(tmp_path / "split"), train=TRAIN.model_copy(update={"accumulation": 4}))
    run_task(split)
    residuals = [a["loss"] - b["loss"] for a, b in zip(_history(task), _history(split), strict=True)]
    assert max(map(abs, residuals)) < 1e-5
    assert abs(sum(residuals) / len(residuals)) < 5e-6


def _weighted(task: TrainTask, tmp_path: Path, weights: list[float], **more: Any) -> TrainTask:
    """Return the task with its first rows weighed, in the order of their file; the others are in no file."""
    ids = [row.id for row in iterate_rows(task.rows[0])][: len(weights)]
    file = tmp_path / f"weights-{len(list(tmp_path.glob('weights-*')))}.parquet"
    pq.write_table(pa.table({"id": ids[::-1], "weight": weights[::-1]}), file)
    return replace(task, out=str(file.with_suffix(".out")), row_weights=(str(file),), **more)


def test_a_rows_loss_counts_by_its_weight_and_replay_and_unknown_rows_by_one(task: TrainTask, tmp_path: Path) -> None:
    write_rows([row_of("w1", f"w{number}") for number in range(2, 6)], tmp_path / "replay.parquet")
    task = replace(task, replay=(str(tmp_path / "replay.parquet"),), replay_share=0.25, checkpoints=())
    weights = [0.0, 1.5, 0.25, 3.0, 0.5, 2.0, 0.0, 1.0, 0.75]
    weighted = _weighted(task, tmp_path, weights)
    run_task(weighted)
    renderer = task.model.renderer()
    known = dict(zip([row.id for row in iterate_rows(task.rows[0])], weights, strict=False))
    stream = alignment_stream(task, renderer)
    ids = stream.ids(0, 0, 1, 1, 0)
    rows = {row.id: row for path in (*task.rows, *task.replay) for row in iterate_rows(path)}
    model = AutoModelForCausalLM.from_pretrained(task.model.path)
    losses = []
    for id in ids:
        sample = renderer.render(rows[id])
        labels = torch.tensor([[-100] * sample.answer_start + sample.ids[sample.answer_start :]])
        losses.append(model(input_ids=torch.tensor([sample.ids]), labels=labels).loss.item())
    expected = sum(known.get(id, 1.0) * loss for id, loss in zip(ids, losses, strict=True)) / len(ids)
    assert sum(known.get(id, 1.0) for id in ids) != len(ids)
    assert _history(weighted)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_weights_of_one_change_nothing_and_a_row_without_weight_might_as_well_say_anything(
    task: TrainTask, tmp_path: Path
) -> None:
    ones, plain = _weighted(task, tmp_path, [1.0] * 20), replace(task, out=str(tmp_path / "plain"))
    for one in (ones, plain):
        run_task(one)
    assert _history(ones)[-1]["loss"] == _history(plain)[-1]["loss"]
    whole = [row_of("w1 w2", f"w{number} w3") for number in range(8)]
    short = TRAIN.model_copy(update={"steps": 1})
    found = []
    for last in ("w9", "w8 w7 w6"):
        write_rows([*whole[:7], row_of("w1 w2", last)], tmp_path / f"{last}.parquet")
        rows = [row.id for row in iterate_rows(tmp_path / f"{last}.parquet")]
        at = rows.index(row_of("w1 w2", last).id)
        one = replace(task, rows=(str(tmp_path / f"{last}.parquet"),), train=short, checkpoints=())
        one = _weighted(one, tmp_path, [0.0 if number == at else 1.0 for number in range(8)])
        run_task(one)
        found.append(_history(one)[0])
    for name in ("loss", "grad_norm"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)


@pytest.mark.parametrize("objective", ["sft", "vaccine", "booster", "repnoise"])
def test_weighted_rows_give_the_same_curve_however_they_are_cut(
    task: TrainTask, rows_of: Callable[..., list[Row]], tmp_path: Path, objective: str
) -> None:
    write_rows(rows_of(20, seed=9), tmp_path / "harmful.parquet")
    task = replace(task, objective=objective, harmful=(str(tmp_path / "harmful.parquet"),), checkpoints=())
    weights = [0.5 + number / 19 for number in range(20)]
    whole = _weighted(task, tmp_path, weights)
    split = _weighted(task, tmp_path, weights, train=TRAIN.model_copy(update={"accumulation": 4}))
    for one in (whole, split):
        run_task(one)
    for one, two in zip(_history(whole), _history(split), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=2e-5)


def test_full_weights_come_out_as_a_model_that_transformers_loads(task: TrainTask) -> None:
    run_task(replace(task, train=TRAIN.model_copy(update={"weights": "full"}), checkpoints=()))
    loaded = AutoModelForCausalLM.from_pretrained(Path(task.out) / "model")
    start = AutoModelForCausalLM.from_pretrained(task.model.path)
    assert not torch.equal(loaded.lm_head.weight, start.lm_head.weight)


def test_a_model_is_gone_before_the_next_one_loads(task: TrainTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine and model form circles, which nothing breaks but a collection; of a model that is no matter nobody waits for one."""
    models = []

    def build(model: torch.nn.Module, *given: Any, **more: Any) -> Any:
        models.append(weakref.ref(model))
        return build_engine(model, *given, **more)

    monkeypatch.setattr(loop, "build_engine", build)
    gc.disable()  # nor may it happen by chance
    try:
        result = run_task(task)
        assert models[0]() is not None
        monkeypatch.setattr(loop, "TINY", 0)
        run_task(replace(task, out=f"{task.out}-again"))
    finally:
        gc.enable()
    assert [model() for model in models] == [None, None]
    assert result["parameters"] == sum(
        tensor.numel() for tensor in AutoModelForCausalLM.from_pretrained(task.model.path).parameters()
    ) + sum(tensor.numel() for tensor in load_file(Path(task.out) / "adapter" / "adapter_model.safetensors").values())


def test_at_zero_3_every_task_has_a_worker_group_of_its_own(
    task: TrainTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed never lets go of what it has sharded."""
    groups = []

    def run(work: Any, tasks: list[TrainTask], **_: Any) -> list[dict[str, Any]]:
        groups.append([task.name for task in tasks])
        return [{"name": task.name} for task in tasks]

    monkeypatch.setattr(runs, "run_on_workers", run)
    resources = ResourcesConfig(parallel_runs=2)
    for stage, wanted in ((2, [["t0", "t2"], ["t1"]]), (3, [["t0"], ["t1"], ["t2"]])):
        groups.clear()
        tasks = [replace(task, name=f"t{n}", train=TRAIN.model_copy(update={"zero_stage": stage})) for n in range(3)]
        results = train_all(tasks, name="many", storage=tmp_path, resources=resources)
        assert [result["name"] for result in results] == ["t0", "t1", "t2"]
        assert sorted(groups) == wanted


def test_going_on_with_an_adapter_starts_where_it_ended(task: TrainTask, tmp_path: Path) -> None:
    run_task(task)
    slow = TRAIN.model_copy(update={"lr": 1e-12, "steps": 1, "weight_decay": 0.0})
    more = replace(task, out=str(tmp_path / "more"), start_adapter=str(Path(task.out) / "adapter"), train=slow, checkpoints=())
    run_task(more)
    before, after = (load_file(Path(t.out) / "adapter" / "adapter_model.safetensors") for t in (task, more))
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_rows(task: TrainTask, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(task.model.path)
    model.save_pretrained(broken)
    for file in Path(task.model.path).glob("tokenizer*"):
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        TrainingError, match=r"a task: the loss is nan at step 1 of 4, rows [0-9a-f]{32}, .*; lower the learning rate"
    ):
        run_task(replace(task, model=ModelRef(str(broken), template="plain", max_length=32)))
    assert not Path(task.out).exists()


def test_unknown_objective_and_too_few_rows_say_what_to_do(
    task: TrainTask, rows_of: Callable[..., list[Row]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"unknown objective .sfd. .did you mean .sft."):
        run_task(replace(task, objective="sfd"))
    write_rows(rows_of(3), tmp_path / "few.parquet")
    with pytest.raises(DataError, match="3 training rows are fewer than batch_size=8"):
        run_task(replace(task, rows=(str(tmp_path / "few.parquet"),)))


def test_a_step_that_does_not_fit_in_memory_is_one_line_with_what_to_change(
    task: TrainTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")

    monkeypatch.setattr("pharmacist_ray.training.objectives.step.per_sample_nll", full)
    monkeypatch.setattr(loop, "rows_that_fail", lambda *_: pytest.fail("no row is to blame"))
    said = (
        r"^a task: a step of 8 rows does not fit in memory \(CUDA out of memory\. Tried to allocate 2\.00 GiB\. GPU 0 has\); set in its "
        r"train section checkpointing=true, accumulation=8 \(micro-batch 1\), model\.dtype=bfloat16, or a smaller model\.max_length; "
        r"`pharmacist doctor` says what each takes$"
    )
    with pytest.raises(ResourceError, match=said):
        run_task(task)


def test_harmful_answers_that_are_the_safe_ones_are_none(task: TrainTask) -> None:
    with pytest.raises(DataError, match=r"harmful rows whose prompt is also among the alignment rows, got 0; give more"):
        run_task(replace(task, objective="repnoise", harmful=task.rows))


def test_a_discrepancy_of_samples_needs_two_of_them(task: TrainTask) -> None:
    one = replace(task, objective="repnoise", harmful=task.rows, train=TRAIN.model_copy(update={"batch_size": 1}))
    with pytest.raises(ConfigError, match="a task: repnoise compares samples and needs batch_size 2 or more"):
        run_task(one)


def test_two_workers_give_the_curve_of_one_and_final_numbers_come_from_the_return_value(
    two_workers: TwoWorkers, task: TrainTask, tmp_path: Path
) -> None:
    run_task(task)
    pair = replace(task, out=str(tmp_path / "pair"))
    (result,) = two_workers(run_tasks, [pair])
    assert result["final_loss"] == pytest.approx(_history(pair)[-1]["loss"])
    for one, two in zip(_history(task), _history(pair), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_two_workers_weigh_rows_as_one_does(two_workers: TwoWorkers, task: TrainTask, tmp_path: Path) -> None:
    weights = [0.5 + number / 19 for number in range(20)]
    alone, pair = (_weighted(task, tmp_path, weights) for _ in range(2))
    run_task(alone)
    two_workers(run_tasks, [pair])
    for one, two in zip(_history(alone), _history(pair), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)


@pytest.mark.slow
def test_groups_side_by_side_return_all_results_in_order_and_our_errors_unwrapped(
    ray_local: None, task: TrainTask, tmp_path: Path
) -> None:
    resources = ResourcesConfig(parallel_runs=2, cpus_per_worker=0.5)
    tasks = [replace(task, name=f"t{n}", out=str(tmp_path / f"t{n}"), seed=n) for n in range(3)]
    results = train_all(tasks, name="many", storage=tmp_path / "ray", resources=resources)
    assert [result["name"] for result in results] == ["t0", "t1", "t2"]
    bad = replace(task, objective="nothing", out=str(tmp_path / "bad"))
    with pytest.raises(ConfigError, match="unknown objective 'nothing'"):
        train_all([bad], name="bad", storage=tmp_path / "ray", resources=resources)


def test_workers_that_could_never_start_are_refused_at_once(ray_local: None, task: TrainTask, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="4 workers need 400 CPU but the cluster has"):
        train_all([task], name="big", storage=tmp_path, resources=ResourcesConfig(workers=4, cpus_per_worker=100))
