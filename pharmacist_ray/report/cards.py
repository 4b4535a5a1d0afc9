"""Cards of what is published: how it was made, what it was measured to do, its licence; and no place on the machine that made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from pharmacist_ray.report.blocks import interval

TAGS = ["safety-alignment", "pharmacist-ray"]
METRICS = {
    "harmful_score": "harmful score", "accuracy_correct": "task accuracy", "helpfulness": "helpful on benign prompts",
    "over_refusal": "over-refusal",
}  # fmt: skip
"""Metric of the comparison → its name on a card."""


def dataset_card(manifest: Mapping[str, Any], *, name: str, licence: str) -> str:
    """Return the card of a curated selection.

    Args:
        manifest: ``manifest.json`` of the selection.
        name: Its name on the hub.
        licence: An identifier, as hubs have it.
    """
    rule = manifest["rule"]
    how = next((f"{key} {rule[key]}" for key in ("ratio", "count", "threshold") if rule.get(key) is not None), "all rows")
    left_out = f", and {manifest['left_out']:,} near-duplicates of better rows left out" if manifest.get("left_out") else ""
    data = DatasetCardData(
        license=licence,
        pretty_name=name.rpartition("/")[2],
        task_categories=["text-generation"],
        tags=[*TAGS, "data-selection"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    )
    return f"""---
{data.to_yaml()}
---

# {name.rpartition("/")[2]}

Safety-alignment rows, selected by pharmacist_ray: {manifest["kept"]:,} of {manifest["candidates"]:,} candidates, by the score
`{rule["scorer"]}` with {how}{left_out}.

```python
from datasets import load_dataset

rows = load_dataset("{name}", split="train")
```

## Columns

The original columns, then `pharmacist_id`, a hash of what a model is trained on, and `pharmacist_score`, the score that the rows were
selected by. A score is comparable within this data set only.

## What it is not

A selection makes an aligned model harder to break by fine-tuning. It is no protection against somebody who controls the fine-tune. What it
is worth hangs on the model that it was scored with: measure before you rely on it.
"""


def adapter_card(
    *,
    name: str,
    licence: str,
    base: str,
    arm: str,
    defence: str,
    kept: int,
    rows: Sequence[Mapping[str, Any]],
) -> str:
    """Return the card of an adapter.

    Args:
        name: Its name on the hub.
        licence: An identifier, as hubs have it.
        base: The base model's name.
        arm: What it was aligned on.
        defence: How.
        kept: Rows that it was aligned on.
        rows: Its rows of the comparison's table, before and after attacks; none where nothing was evaluated.
    """
    short = name.rpartition("/")[2]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="own",
            dataset_name="prompts of the comparison" if row["attack"] is None else f"after the attack '{row['attack']}'",
            metric_type=metric,
            metric_name=words,
            metric_value=round(row["metrics"][metric]["estimate"], 4),
        )
        for row in rows
        for metric, words in METRICS.items()
        if row["metrics"].get(metric, {}).get("estimate") is not None
    ]
    data = ModelCardData(
        license=licence,
        base_model=base,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=TAGS,
        model_name=short if results else None,
        eval_results=results or None,
    )
    return f"""---
{data.to_yaml()}
---

# {short}

An adapter for `{base}`, aligned on {kept:,} rows (`{arm}`) by `{defence}`, made by pharmacist_ray.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{name}")
```

## What was measured

{_table(rows) if rows else "Nothing yet."}

## What it is not

An aligned model is harder to break by fine-tuning, and can still be broken by somebody who controls the fine-tune.
"""


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [name for name in METRICS if any(row["metrics"].get(name, {}).get("estimate") is not None for row in rows)]
    lines = [f"| after | {' | '.join(METRICS[name] for name in shown)} |", f"| --- |{' ---: |' * len(shown)}"]
    for row in rows:
        found = [row["metrics"].get(name, {}) for name in shown]
        cells = [interval(one.get("estimate"), one.get("low"), one.get("high")) for one in found]
        lines.append(f"| {row['attack'] or 'alignment'} | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", "In brackets 95 % intervals. The harmful score is the share of harmful prompts that are complied with."]
    )
