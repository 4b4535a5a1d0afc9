"""What tasks of lm-evaluation-harness say of the models."""

from __future__ import annotations

from pharmacist_ray.report.blocks import Block, Table, number
from pharmacist_ray.report.run_files import RunFiles


def by_tasks(run: RunFiles) -> list[Block]:
    """Return a table of the models that are still there, a column a metric; nothing where no model was measured."""
    trained = {one.get("fingerprint") for stage in ("align", "attack", "repair") for one in run.made(stage).values()}
    newest: dict[str, dict[str, dict[str, float]]] = {}
    for one in sorted(run.made("lm_eval").values(), key=lambda one: str(one.get("made_at", ""))):
        if one.get("inputs", {}).get("model") in trained:
            newest[str(one["summary"]["name"])] = one["summary"]["results"]
    columns = dict.fromkeys(
        (task, metric)
        for results in newest.values()
        for task, metrics in results.items()
        for metric in metrics
        if "_stderr" not in metric
    )
    if not columns:
        return []
    rows = [(name, *(_cell(results.get(task, {}), metric) for task, metric in columns)) for name, results in newest.items()]
    header = ("model", *(f"{task}, {metric.partition(',')[0]}" for task, metric in columns))
    return [Table("Tasks of lm-evaluation-harness, with one standard error", header, rows)]


def _cell(metrics: dict[str, float], metric: str) -> str:
    name, comma, rest = metric.partition(",")
    error = metrics.get(f"{name}_stderr{comma}{rest}")
    return number(metrics.get(metric), 3) + (f" ± {number(error, 3)}" if error is not None else "")
