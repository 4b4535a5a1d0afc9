from __future__ import annotations

import re
from collections.abc import Callable

from pharmacist_ray.config.schema import Config
from pharmacist_ray.doctor.cluster import parse_cluster
from pharmacist_ray.doctor.estimate import memory, setup_of, total
from pharmacist_ray.doctor.frailty import first_to_break, frailties, held_by_stages
from pharmacist_ray.doctor.layout import room
from pharmacist_ray.doctor.planner import plan_for


def lines(config: Config, cluster: str, rows: float = 1e6) -> list[str]:
    run, shape, work, layout = plan_for(config, parse_cluster(cluster)[0], rows)
    assert layout.problems == []
    return list(frailties(run, layout, shape, work, room(layout.pool)))


def test_the_stage_that_breaks_first_fits_at_half_the_length_and_not_at_the_whole(llama: Callable[..., Config]) -> None:
    _, shape, work, layout = plan_for(llama("8b"), parse_cluster("8xA100-40")[0], 1e6)
    found = first_to_break(layout, shape, work, room(layout.pool))
    assert found is not None
    length, name, held = found
    for there in (length, length // 2):
        model = layout.config.model.model_copy(update={"max_length": there})
        config = layout.config.model_copy(update={"model": model})
        needed = total(memory(shape, setup_of(config, config.trainings()[name])))
        assert (needed > room(layout.pool)) == (there == length)
        if there == length:
            assert needed == held


def test_every_stage_of_the_run_is_told_and_no_other(llama: Callable[..., Config]) -> None:
    _, shape, work, layout = plan_for(llama("8b"), parse_cluster("8xH100")[0], 1e6)
    assert list(held_by_stages(layout, shape, work)) == [
        "selector.warmup",
        "alignment.train",
        "selector.reference",
        "fit: directions",
        "score",
    ]
    config = llama("8b", "scoring.scorers=[low_loss]", "selection.scorer=low_loss", "comparison.selections=[low_loss]",
                   "comparison.defences=[sft,booster]")  # fmt: skip
    _, shape, work, layout = plan_for(config, parse_cluster("8xH100")[0], 1e6)
    assert list(held_by_stages(layout, shape, work)) == ["alignment.train (sft)", "alignment.train (booster)", "score"]


def test_what_is_near_its_end_is_told(llama: Callable[..., Config]) -> None:
    assert [line.partition(":")[0] for line in lines(llama("8b"), "8xH100")] == ["memory", "longer rows"]
    found = "\n".join(lines(llama("8b", "resources.workers=1", "alignment.train.batch_size=9", "alignment.train.accumulation=1"),
                           "16xL40S", 1e9))  # fmt: skip
    assert (
        "training: 12 of 16 GPUs wait, for batches of 9, 64 rows are shared evenly by 1 at most, and 4 models are trained"
        in found
    )
    assert re.search(r"score takes 10\d\.\d days: ", found)  # 14,400 GPU hours of an H100
    assert "nodes will be lost on the way; what is finished is kept, and the same command goes on" in found
    learnt = llama("8b", "scoring.scorers=[pharmacist_iterative]", "selection.scorer=pharmacist_iterative",
                   "comparison.selections=[pharmacist_iterative]", "selector.inner_lr=1e-3")  # fmt: skip
    assert any(
        "a logit for each of 10,000,000 candidates, and at most 5,000,000 are learnt" in one
        for one in lines(learnt, "8xH100", 1e7)
    )
    offloaded = lines(llama("8b", "alignment.train.weights=full", "alignment.train.zero_stage=1"), "2xL40S")
    assert any("CPU memory: offloaded parts take" in one for one in offloaded)
