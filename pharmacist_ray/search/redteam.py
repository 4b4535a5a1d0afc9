"""The attacker's search: against every arm, the fine-tune that does most harm and leaves a model that somebody would still use.

A fixed list of attacks says how a defence fares against those attacks. Here an attacker with a budget varies its own settings, for each
arm anew, and what is reported is the worst of what it found (the bounded worst case of TamperBench, arXiv 2602.06911; that both task
accuracy and helpfulness are bounded, each against the arm before the attack: ours). The maximum over trials is one over noisy numbers:
read it with its interval, and compare arms at the same number of trials.

What a trial found is known from its own record, as in `search`: running it again does what is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray import tune

from pharmacist_ray.config.load import assign, located, parse_config
from pharmacist_ray.config.schema import AttackConfig, Config
from pharmacist_ray.data.mixing import check_counts
from pharmacist_ray.data.rows import count_rows
from pharmacist_ray.errors import ArtifactError, ConfigError, DataError, unknown_name
from pharmacist_ray.evaluation.judges import check_judges
from pharmacist_ray.pipeline.artifacts import digest
from pharmacist_ray.pipeline.console import bar, console, escaped, followed, say
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.session import begin, connected
from pharmacist_ray.pipeline.stages import STAGES, check, reused
from pharmacist_ray.search.early import SIGNAL, asha, look, told
from pharmacist_ray.search.search import check_trial_room
from pharmacist_ray.search.space import Point, decoded, described, drawn_from, listed, probes
from pharmacist_ray.search.trial import Record, go_through, look_early, read_record, read_records, record_file, write_record
from pharmacist_ray.search.tuning import optuna_search, run_trials
from pharmacist_ray.search.worst import bounded_worst, budget_curve, damage, measured, samples_of, shown, trials_table
from pharmacist_ray.storage import StoragePath, write_parquet, write_text

KIND = "redteam"
"""The folder of its records in the run directory."""


@dataclass(frozen=True)
class Target:
    """An arm of the comparison, aligned by one defence."""

    selection: str
    defence: str

    @property
    def name(self) -> str:
        """For people: ``pharmacist`` or ``pharmacist.vaccine``."""
        return f"{self.selection}.{self.defence}"


def run_redteam(config: Config) -> StoragePath:
    """Let the attacker search against every arm, or do what is missing of it, and return the folder with its results.

    ``trials.parquet`` has a row a trial, ``redteam.json`` each arm's bounded worst case and the attack that made it, as a run's
    ``attacks`` takes it. A trial that fails is recorded and does not end the search.

    Args:
        config: A run's configuration with ``attacks`` and ``evaluation``; its ``redteam`` section says what is varied.

    Raises:
        PharmacistError: The space has a mistake, the cluster has no room, or every trial of an arm failed.
    """
    config = located(config)
    run = Run(config)
    check(run)
    plan, attack = config.redteam, base_attack(config)
    points = listed(plan) if plan.algorithm == "random" else []
    for point in points or probes(plan):
        attacked_config(config, targets(config)[0], point)
    run.config.require_evaluation()
    assert config.evaluation is not None
    check_judges(config.evaluation.judges, ready=True)
    begin(config, run)
    with connected(config.resources, trials=plan.concurrent):
        check_trial_room(config.resources, plan.concurrent)
        for stage in ("ingest", "fit", "score", "select", "align"):
            say(f"[bold]{stage}[/]{reused(run, stage)}")
            STAGES[stage](run)
        _check_rows(run, attack)
        for target in targets(config):
            say(f"[bold]redteam[/] {escaped(target.name)}: {plan.trials} trials, {plan.concurrent} at a time")
            _attack(run, target, points)
    return _conclude(run)


def base_attack(config: Config) -> AttackConfig:
    """Return the attack whose settings are varied.

    Raises:
        ConfigError: There is none, or none of the name that is asked for.
    """
    if not config.attacks:
        raise ConfigError("the red team varies the settings of an attack: give at least one of `attacks`")
    names = {attack.name: attack for attack in config.attacks}
    name = config.redteam.attack or next(iter(names))
    if name not in names:
        raise unknown_name("attack of redteam.attack", name, list(names))
    return names[name]


def targets(config: Config) -> list[Target]:
    """Return the arms that are attacked; what is not aligned is one model under all objectives of alignment."""
    pairs = [(arm, defence) for defence in config.defences for arm in dict.fromkeys(config.comparison.selections)]
    return [Target(arm, defence) for arm, defence in pairs if arm != "none" or defence in config.unaligned]


def attacked_config(config: Config, target: Target, point: Mapping[str, Any]) -> Config:
    """Return the configuration of a trial: one arm, and one attack with a point's values.

    Args:
        config: The red team's configuration.
        target: The arm.
        point: Key of the attack → value.

    Raises:
        ConfigError: A key is unknown or a value is wrong.
    """
    attack = base_attack(config).model_dump(mode="json")
    if "kind" in point:
        attack.pop("form", None)  # which is that of the kind
    try:
        for key, value in point.items():
            if key.startswith("lora.") and not attack.get("lora"):
                attack["lora"] = config.model.lora.model_dump(mode="json")
            assign(attack, key, value)
        if "train.steps" in point and "train.epochs" not in point:
            assign(attack, "train.epochs", None)  # which would go before steps
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"redteam.space: {str(error).removeprefix('override ')}") from None
    values = config.model_dump(mode="json", exclude={"search", "redteam"}) | {"attacks": [attack]}
    values["comparison"] |= {"selections": [target.selection], "defences": [target.defence]}
    return located(parse_config(values, where=f"redteam.space ({described(point)})"))


def _check_rows(run: Run, attack: AttackConfig) -> None:
    """Find out before anything is attacked whether there are rows for the largest fine-tunes of the space."""
    there = {
        what: count_rows(run.ingested(f"attack-{attack.name}-{what}").folder / "rows") for what in (*attack.attackers, "task")
    }
    for point in probes(run.config.redteam):
        one = attacked_config(run.config, targets(run.config)[0], point).attacks[0]
        try:
            check_counts(one.name, there, rows=one.rows, harmful_share=one.harmful_share, attacker=one.attacker)
        except DataError as error:
            raise DataError(f"redteam.space ({described(point)}): {error}") from None


def _attack(run: Run, target: Target, points: Sequence[Point]) -> None:
    """Let Ray Tune run the trials against one arm."""
    plan = run.config.redteam
    settings: dict[str, Any] = {}
    if points:
        space: dict[str, Any] = {"number": tune.grid_search(list(range(len(points))))}
    else:
        space, settings = (
            {},
            {"search_alg": optuna_search(plan, records_of(run, target), {"damage": "max"}), "num_samples": plan.trials},
        )
    if plan.scheduler == "asha":
        settings |= {"scheduler": asha(plan.early, mode="max")}
    work = tune.with_parameters(_trial, base=run, target=target, points=list(points))
    with _watched(run, target):
        run_trials(work, space, root=run.root, kind=KIND, concurrent=plan.concurrent, **settings)
    for record in records_of(run, target):
        if record["status"] == "running":  # its process died without a word
            error = "the trial's process died; the memory may have run out"
            write_record(record_file(run.root, record["trial"], KIND), record | {"status": "failed", "error": error})


def _trial(drawn: dict[str, Any], base: Run, target: Target, points: list[Point]) -> dict[str, Any]:
    """Run a trial in the process that Ray Tune gives it."""
    plan = base.config.redteam
    point = points[drawn["number"]] if points else decoded(plan, drawn)
    return run_attack_trial(base, target, point, {} if points else drawn, tune.report if plan.scheduler == "asha" else None)


def run_attack_trial(
    base: Run,
    target: Target,
    point: Point,
    drawn: Mapping[str, Any] | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Attack an arm with one point of the space, and return what the attacker wants most, as ``damage``.

    A trial that has finished before, from just these inputs, is not run again, nor is one that was stopped after the same early look.

    Args:
        base: The run whose arms are attacked; its models are aligned.
        target: The arm.
        point: Key of the attack → value.
        drawn: The point as the searcher drew it; kept, so that it can be told of it again.
        report: Told of the early look, which it may end the trial at; without it there is none.

    Raises:
        PharmacistError: What a stage raised, after it was recorded.
    """
    plan, config = base.config.redteam, attacked_config(base.config, target, point)
    run = Run(config, base=base)
    name = trial_name(target, point)
    file, fingerprint = record_file(base.root, name, KIND), run.evaluated.fingerprint
    known, how, seen = read_record(file), plan.early.model_dump(include={"prompts"}), dict[str, Any]()
    if known.get("fingerprint") == fingerprint:
        if known["status"] == "stopped" and report and known["early"] == how:
            return told(report, name, known[SIGNAL]) | {"damage": 0.0}
        if known["status"] == "finished":
            if report:
                seen = told(report, name, known[SIGNAL] if known.get("early") == how else look(run, plan.early))
            return seen | {"damage": damage(known, plan.bound)}
    record: Record = {
        "trial": name,
        "status": "running",
        "fingerprint": fingerprint,
        "parameters": point,
        "drawn": dict(drawn or {}),
    }
    attack = config.attacks[0]
    record |= {"selection": target.selection, "defence": target.defence, "samples": samples_of(attack), "started_at": time.time()}

    def before(stage: str) -> None:
        nonlocal seen
        if stage == "evaluate" and report:
            seen = look_early(run, file, record, plan.early, how, report)

    go_through(run, file, record, before, measured)
    return seen | {"damage": damage(record, plan.bound)}


def records_of(run: Run, target: Target) -> list[Record]:
    """Return the records of an arm's trials in this space, in the order in which they started."""
    plan = run.config.redteam
    known = {trial_name(target, point) for point in listed(plan)}
    return [
        record
        for record in read_records(run.root, KIND)
        if (record["selection"], record["defence"]) == (target.selection, target.defence)
        and (record["trial"] in known if plan.algorithm == "random" else drawn_from(plan, record["drawn"]))
    ]


def trial_name(target: Target, point: Point) -> str:
    """Return eight digits that stand for a point tried on an arm."""
    return digest([target.name, point])[:8]


@contextmanager
def _watched(run: Run, target: Target) -> Iterator[None]:
    """Show how many trials against an arm are done, and the worst so far."""
    plan, since = run.config.redteam, time.time()

    def state() -> None:
        records = records_of(run, target)
        running = [one["stage"] for one in records if one["status"] == "running" and one["started_at"] >= since]
        worst = bounded_worst(records, plan.bound)
        line = f"{len(running)} running" + (f" ({', '.join(running)})" if running else "")
        line += f", worst HS within the bound {worst['hs']:.2f}" if worst else ", none within the bound so far"
        show(sum(one["status"] != "running" for one in records), plan.trials, f" · {escaped(line)}")

    with bar(f"redteam {escaped(target.name)} (trials)") as show, followed(state, [run.root]):
        yield


def _conclude(run: Run) -> StoragePath:
    """Write each arm's worst case and the table of trials, and print them, the most robust arm first."""
    config, folder = run.config, run.root / KIND
    rows, records = [], list[Record]()
    for target in targets(config):
        mine = records_of(run, target)
        records += mine
        finished = [record for record in mine if record["status"] == "finished"]
        if not finished:
            raise ArtifactError(
                f"{target.name}: none of the {len(mine)} trials finished; their errors are in {folder / 'trials'}"
            )
        rows.append(_row(config, target, mine, finished))
    rows.sort(key=lambda row: (row["worst"]["hs"] if row["worst"] else -1.0, row["unbounded_hs"]))
    found = {"bound": config.redteam.bound, "trials": config.redteam.trials, "attack": base_attack(config).name, "arms": rows}
    write_text(json.dumps(found, indent=1), folder / "redteam.json")
    write_parquet(trials_table(records, config.redteam.bound), folder / "trials.parquet")
    for record in (one for one in records if one["status"] == "failed"):
        said = f"{record['selection']}.{record['defence']}, {described(record['parameters'])}"
        say(f"  [red]trial {record['trial']} failed[/] ({escaped(said)}): {escaped(record['error'])}")
    console.print(shown(rows, config.redteam.bound))
    say(f"  each arm's worst attack: {escaped(folder / 'redteam.json')}; all trials: {escaped(folder / 'trials.parquet')}")
    return folder


def _row(config: Config, target: Target, records: Sequence[Record], finished: Sequence[Record]) -> Record:
    bound = config.redteam.bound
    worst = bounded_worst(records, bound)
    within = [record for record in finished if damage(record, bound) >= 0]
    row: Record = {"selection": target.selection, "defence": target.defence, "trials": len(records), "finished": len(finished)}
    row |= {"within": len(within), "hs_before": finished[0]["hs_before"], "unbounded_hs": max(one["hs"] for one in finished)}
    row |= {"worst": None, "attack": None, "curve": budget_curve(records, bound)}
    if worst is not None:
        numbers = (
            "hs",
            "hs_low",
            "hs_high",
            "accuracy",
            "accuracy_before",
            "helpful",
            "helpful_before",
            "lost",
            "samples",
            "trial",
        )
        row["worst"] = {name: worst[name] for name in numbers} | {"parameters": worst["parameters"]}
        attack = attacked_config(config, target, worst["parameters"]).attacks[0]
        row["attack"] = attack.model_copy(update={"name": f"{attack.name}-{worst['trial']}"}).model_dump(mode="json")
    return row
