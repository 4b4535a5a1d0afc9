"""What a run's cascade asks of its proxy: by which arms rows are passed on, what the proxy is, and what cannot work.

A proxy is a model like the one to harden, so it is fitted and scores as that one does: `Run.proxied` is the same run with another
model, of the same ingested rows, in folders below ``proxy/``. Its selector is fitted in an adapter space of its own, by the stage `fit`
beside that of the model to harden, and its scores are made by the stage `score` before the cascade: artifacts with fingerprints of
their own, so that a change of the share or of the model to harden costs the proxy nothing, and a change of the proxy leaves the large
selector alone.

A cascade is about scores that need the model and that an arm selects by. Those that only read text are computed for every row, and a
score that nobody selects by decides nothing about who is seen: the proxy does not compute it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pharmacist_ray.config.schema import Config, SelectorConfig
from pharmacist_ray.config.scoring import CALIBRATED
from pharmacist_ray.curation.calibrate import calibration_columns
from pharmacist_ray.curation.scorers import SCORERS, columns_of, needs_model, parts_of
from pharmacist_ray.curation.selector import LEARNT
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.models.quantized import check_bits


def ranked_by(config: Config, arm: str) -> list[str]:
    """Return the scorers that an arm's ranking is made of; none where its rows are drawn, or all."""
    if arm in config.selection.sums:
        return list(config.selection.sums[arm])
    if arm == CALIBRATED:
        return list(calibration_columns(config.scoring.scorers))
    return [arm] if arm in {*config.scoring.scorers} - {"random"} else []


def passing_arms(config: Config, arms: Iterable[str]) -> list[str]:
    """Return the arms by whose rankings rows are passed on: those that a score which needs the model has a part in."""
    return [arm for arm in arms if needs_model(ranked_by(config, arm))]


def share_asked(config: Config, arms: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return what of a selection bears on which rows are passed on.

    Args:
        config: The configuration.
        arms: The arms that are written, and the columns that take turns in each.
    """
    ranked = {arm: [config.selection.sums.get(arm, {}), list(arms[arm])] for arm in passing_arms(config, arms)}
    return {"ratio": config.selection.ratio, "count": config.selection.count, "arms": ranked}


def proxy_config(config: Config, arms: Sequence[str]) -> Config:
    """Return the configuration of what the proxy makes: only the scores that arms are ranked by, in a run directory of its own.

    Args:
        config: A run's, with a cascade.
        arms: The arms that are written.
    """
    proxy = config.scoring.proxy
    assert proxy is not None
    bits = proxy.quantization or (None if proxy.path else config.model.quantization)
    model = config.model.model_copy(update={"path": proxy.path or config.model.path, "quantization": bits})
    asked = {name for arm in passing_arms(config, arms) for name in ranked_by(config, arm)}
    scorers = [name for name in config.scoring.scorers if name in asked]
    # An adapter of the model to harden fits no other: the proxy's own states stand for those of a Refusal-Teacher.
    scoring = config.scoring.model_copy(update={"proxy": None, "scorers": scorers, "refusal_teacher": None})
    selector, given = _whole(config.selector) if bits else config.selector, config.resources
    # It fits one GPU: where the model takes a group of workers, each of them scores for itself.
    resources = given.model_copy(update={"actors": given.actors * given.workers_per_actor, "workers_per_actor": 1})
    changed: dict[str, Any] = {"model": model, "scoring": scoring, "selector": selector, "resources": resources}
    changed["run_dir"] = config.run_dir / "proxy"
    return config.model_copy(update=changed)


def _whole(selector: SelectorConfig) -> SelectorConfig:
    """Return the selector's section with no training sharded by ZeRO 3, which cannot shard weights in few bits."""
    trainings = {name: getattr(selector, name) for name in ("warmup", "reference", "tov")}
    sharded = {name: train for name, train in trainings.items() if train is not None and train.zero_stage == 3}
    whole = {name: train.model_copy(update={"zero_stage": 2, "offload": "none"}) for name, train in sharded.items()}
    return selector.model_copy(update=whole)


def check_proxy(config: Config, arms: Sequence[str]) -> None:
    """Find out before anything runs whether a cascade can do what it promises.

    Args:
        config: The configuration.
        arms: The arms that are written.

    Raises:
        ConfigError: The selection is not a top k; no arm asks the model; a score is learnt for each candidate; ``all`` has no score that
            every row has; or weights in few bits cannot be had.
        ModelError: There is no such proxy, or it has fewer layers.
    """
    proxy, selection, scorers = config.scoring.proxy, config.selection, config.scoring.scorers
    if proxy is None:
        return
    from pharmacist_ray.models.load import empty_model  # with transformers' models, which take seconds

    given = {name: getattr(selection, name) for name in ("threshold", "quotas", "near_duplicates")}
    if asked := [f"selection.{name}" for name, value in given.items() if value not in (None, {})]:
        raise ConfigError(
            f"scoring.proxy bounds what is lost of the model's top rows and cannot heed {', '.join(asked)}: use selection.ratio or count "
            "alone, or leave scoring.proxy out"
        )
    if not passing_arms(config, arms):
        raise ConfigError(
            f"scoring.proxy spares the model rows, and no arm ({', '.join(arms)}) selects by a score that needs the model: leave it out"
        )
    if learnt := [part for part in parts_of(scorers, config.selector) if part in LEARNT]:
        raise ConfigError(
            f"scoring.proxy has nothing to spare where the model learns a logit for each candidate ({', '.join(learnt)}): take "
            f"the scores that do out of scoring.scorers (now {', '.join(scorers)}), or leave scoring.proxy out"
        )
    if "all" in arms and not any(name == "random" or not SCORERS[name].needs_model for name in scorers):
        raise ConfigError(
            "the arm all needs a score that every row has, which scoring.proxy leaves to text: add random to scoring.scorers"
        )
    of_proxy = proxy_config(config, arms)
    check_bits(of_proxy.model, "scoring.proxy.quantization" if proxy.quantization else "model.quantization")
    empty_model(of_proxy.model.path, trust_remote_code=of_proxy.model.trust_remote_code, layers=proxy.layers)


def for_every_row(config: Config) -> str:
    """Return a score column that every row has, by which the arm ``all`` takes everything."""
    columns = columns_of(config.scoring, config.selector)
    if config.scoring.proxy is None:
        return "random_0" if "random_0" in columns else columns[0]
    return "random_0" if "random_0" in columns else next(name for name in config.scoring.scorers if not SCORERS[name].needs_model)
