"""`pharmacist finetune`: the aligned model on a user's rows, with the defence and the repair of a configuration, as a service runs it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from pharmacist_ray.config.load import located, parse_config
from pharmacist_ray.config.schema import Config
from pharmacist_ray.config.scoring import arm_of
from pharmacist_ray.data.rows import count_rows
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.pipeline.artifacts import digest
from pharmacist_ray.pipeline.console import escaped, say
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.secrets import existing_secret
from pharmacist_ray.pipeline.session import begin, connected
from pharmacist_ray.pipeline.stages import STAGES, check, reused
from pharmacist_ray.storage import StoragePath, json_of, write_text


def run_finetune(config: Config, data: Sequence[str] = ()) -> StoragePath:
    """Fine-tune the model that is aligned on the main selection, or do what is missing of it, and return the folder with the result.

    ``finetune.json`` there names the base, the adapters in the order in which they are merged, and what was done; what is aligned is
    shared with the comparisons of the same run directory. With an ``evaluation`` section the model is asked before and after.

    Args:
        config: A run's configuration.
        data: Files of the user's rows, in the place of ``finetune.data``.

    Raises:
        PharmacistError: No data is given, or whatever a stage raises.
    """
    config = located(finetune_config(config, data))
    base, name = Run(config), config.attacks[0].name
    check(base)
    begin(config, base)
    with connected(config.resources):
        for stage in ("ingest", "fit", "score", "select", "align"):
            say(f"[bold]{stage}[/]{reused(base, stage)}")
            STAGES[stage](base)
        run = Run(_of_all_rows(config, base), base=base)
        STAGES["select"](run)  # whose rows lie apart from the base's, for the safe ones
        for stage in ("attack", "evaluate") if config.evaluation else ("attack",):
            say(f"[bold]{'fine-tune' if stage == 'attack' else stage}[/]{reused(run, stage)}")
            STAGES[stage](run)
    tuned = run.attacks_on(run.variants[0])[0]
    ref, trained = run.model_of(tuned), run.trained(tuned)
    facts: dict[str, Any] = {
        "base": ref.path,
        "adapters": list(ref.adapters),
        **({"soft_prompt": ref.soft_prompt} if ref.soft_prompt else {}),
        "defence": tuned.defence,
        "rows": run.config.attacks[0].rows,
        "training": trained.manifest()["summary"],
    }
    if secret := existing_secret(run, tuned):
        facts["asked_behind"] = str(secret)
        say(f"  ask it behind the secret in {escaped(secret)}, before every system prompt; without it nothing defends this model")
    if config.evaluation:
        facts["table"] = json_of(run.evaluated.folder / "table.json")
        _tell(facts["table"])
    folder = run.root / "finetune" / name
    write_text(json.dumps(facts, indent=1), folder / "finetune.json")
    say(f"  fine-tuned on {facts['rows']} rows by {escaped(tuned.defence)}: {escaped(trained.folder / 'run')}")
    say(f"  base, adapters and what was done: {escaped(folder / 'finetune.json')}")
    return folder


def finetune_config(config: Config, data: Sequence[str] = ()) -> Config:
    """Return a configuration whose one model is aligned on the main selection, and whose one fine-tune is the user's.

    Raises:
        ConfigError: No rows are given.
    """
    plan = config.finetune
    source = plan.data.model_dump(mode="json") if plan.data else {}
    if data:
        source |= {"path": list(data)}
    if not source:
        raise ConfigError("there is nothing to fine-tune on: give a file, or finetune.data")
    values = config.model_dump(mode="json", exclude={"search", "redteam", "audit"})
    values["attacks"] = [
        {
            "name": f"{PurePath(source['path'][0]).stem[:40] or 'rows'}-{digest(source)[:8]}",
            "task": source,
            "harmful": values["data"]["harmful"],  # none of it is trained on
            "harmful_share": 0.0,
            "rows": 1,  # until they are counted
            "adapter": plan.adapter,
            "train": plan.train.model_dump(mode="json"),
        }
    ]
    values["comparison"] = {"selections": [arm_of(config.selection.scorer)], "seeds": config.comparison.seeds[:1]}
    return parse_config(values, where="finetune")


def _of_all_rows(config: Config, base: Run) -> Config:
    """Return the configuration with the number of rows that could be read."""
    attack = config.attacks[0]
    count = count_rows(base.ingested(f"attack-{attack.name}-task").folder / "rows")
    return config.model_copy(update={"attacks": [attack.model_copy(update={"rows": count})]})


def _tell(table: Sequence[dict[str, Any]]) -> None:
    """Say what the fine-tune did to the model."""
    before, after = ({name: one["estimate"] for name, one in row["metrics"].items()} for row in table if "over" not in row)
    parts = [
        f"{words} {before[name]:.2f} → {after[name]:.2f}"
        for name, words in (("harmful_score", "harmful score"), ("helpfulness", "helpful"), ("over_refusal", "over-refusal"))
        if before.get(name) is not None and after.get(name) is not None
    ]
    say(f"  {', '.join(parts)}")
