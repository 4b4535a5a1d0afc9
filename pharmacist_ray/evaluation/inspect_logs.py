"""Judged answers as logs of inspect (UK AI Security Institute), which `inspect view` shows: a log for each model and set of prompts."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from typing import Any

from pharmacist_ray.data.rows import parquet_files
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.storage import StoragePath, read_table, replacing


def check_inspect() -> None:
    """Check that the library is there.

    Raises:
        ConfigError: Says what to install.
    """
    if find_spec("inspect_ai") is None:
        raise ConfigError("evaluation.inspect needs a package that is not installed; pip install 'pharmacist-ray[inspect]'")


def write_logs(
    answers: StoragePath, out: StoragePath, *, model: str, judges: list[str], made_at: str, about: dict[str, Any]
) -> None:
    """Write ``out/<set>.eval`` for every set that a model has answered; those that are there stay.

    A sample is a prompt. Its scores are what each judge said; of a task, whether the answer is correct. The log's metrics are the shares
    of each verdict, without intervals: those of a comparison are in ``table.json``.

    Args:
        answers: Folder with files of `ANSWER_SCHEMA`.
        out: Folder to write to.
        model: The model's name.
        judges: Names of the judges, the first one first.
        made_at: When the answers were judged, ISO 8601 with a time zone.
        about: What else is known of the model, for the log's metadata.
    """
    sets: dict[str, list[StoragePath]] = {}
    for file in parquet_files(answers):
        sets.setdefault(file.name.rpartition("-")[0], []).append(file)
    for name, files in sets.items():
        if (out / f"{name}.eval").exists():
            continue
        from inspect_ai.log import write_eval_log  # takes a second to import

        rows = [row for file in files for row in read_table(file).to_pylist()]
        with replacing(out / f"{name}.eval") as temporary:
            write_eval_log(_log(name, rows, model, judges, made_at, about), str(temporary), format="eval")


def _log(name: str, rows: list[dict[str, Any]], model: str, judges: list[str], made_at: str, about: dict[str, Any]) -> Any:
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalMetric, EvalResults, EvalSample, EvalScore, EvalSpec
    from inspect_ai.model import ModelOutput
    from inspect_ai.scorer import CORRECT, INCORRECT, Score

    scorers = ["correct"] if name == "task" else judges
    samples, said = [], {scorer: Counter[str]() for scorer in scorers}
    for row in rows:
        if name == "task":
            values = [CORRECT if row["correct"] else INCORRECT]
        else:
            values = [row["verdict"] or "unjudged", *(row.get("others") or [])]
        for scorer, value in zip(scorers, values, strict=True):
            said[scorer][value] += 1
        samples.append(
            EvalSample(
                id=row["id"],
                epoch=1,
                input=row["prompt"],
                target=row["expected"] or "",
                output=ModelOutput.from_content(model, row["answer"] or ""),
                scores={
                    scorer: Score(value=value, answer=row["answer"] or "") for scorer, value in zip(scorers, values, strict=True)
                },
            )
        )
    scores = [
        EvalScore(
            name=scorer,
            scorer=scorer,
            scored_samples=len(rows),
            metrics={value: EvalMetric(name=value, value=count / len(rows)) for value, count in sorted(counts.items())},
        )
        for scorer, counts in said.items()
    ]
    spec = EvalSpec(
        created=made_at,
        task=f"pharmacist_{name}",
        dataset=EvalDataset(name=name, samples=len(rows)),
        model=model,
        config=EvalConfig(),
        metadata=about,
    )
    results = EvalResults(total_samples=len(rows), completed_samples=len(rows), scores=scores)
    return EvalLog(status="success", eval=spec, results=results, samples=samples)
