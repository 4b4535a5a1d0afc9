"""A run: which artifacts a configuration stands for, where they lie, and what each is made from.

Everything here is a pure function of the configuration, of the input files' identity and, for a run directory that version 0.1.0
made, of that version's rule for identities; nothing is computed or written.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

from pharmacist_ray.config.finetune import PLAIN, UNREPAIRED
from pharmacist_ray.config.schema import Config, Section, SourceConfig
from pharmacist_ray.config.scoring import arm_of, folder_of
from pharmacist_ray.curation.planted import KINDS
from pharmacist_ray.curation.scorers import SCORERS, needs_model, parts_of, parts_of_score
from pharmacist_ray.curation.scorers.trusted import TrustedSets
from pharmacist_ray.curation.selector import part_files
from pharmacist_ray.curation.trainers import EXPORTS
from pharmacist_ray.data.rows import count_rows
from pharmacist_ray.models.hub import at_one_commit
from pharmacist_ray.models.precision import with_dtype
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.pipeline.artifacts import PLACES, Artifact, digest, without
from pharmacist_ray.pipeline.identity import dated_identity, file_identity
from pharmacist_ray.pipeline.proxied import proxy_config, share_asked
from pharmacist_ray.pipeline.variants import COLUMNS, Variant, asked_of, asks_ordinary, settled, weighed_in
from pharmacist_ray.storage import StoragePath, relative
from pharmacist_ray.training.objectives import OBJECTIVES


class Run:
    """The artifacts of one configuration."""

    def __init__(self, config: Config, *, base: Run | None = None, rows_of: Run | None = None) -> None:
        """Lay out a run.

        Args:
            config: The checked configuration.
            base: For a trial of a search, the run that it varies, in the same run directory. What both make from the same inputs
                lies where the base has it; everything else of the trial lies in folders that carry its fingerprint, so that trials
                share what they can and never take each other's place.
            rows_of: For what a cascade's proxy makes, the run whose rows it scores; see `proxied`.
        """
        self.root = config.run_dir
        self.config: Config = with_dtype(at_one_commit(config, base.config.model.path if base else None))
        self.base, self.rows_of = base, rows_of
        elder = base or rows_of
        self.known_files: dict[str, Any] = elder.known_files if elder else {}  # path → identity, as far as anything has asked

    def _file(self, path: str) -> Any:
        """What identifies a file or folder as it is now; looked up once, so that a run and its trials agree with each other."""
        if path not in self.known_files:
            self.known_files[path] = dated_identity(path) if self._dated else file_identity(path)
        return self.known_files[path]

    @cached_property
    def _dated(self) -> bool:
        """Whether version 0.1.0 made this directory from the files that are there now, as far as it could tell.

        That version knew files by where they lie and when they changed. Fingerprints build on each other, so such a directory keeps
        its rule, or nothing in it would be found again. Once its candidates or its model moved or changed, the directory is made anew
        by the present rule.
        """
        if elder := self.base or self.rows_of:
            return elder._dated
        source, model = self.config.data.candidates, self.config.model
        inputs = Artifact(self.root / "ingest" / "candidates", "ingest", {}).manifest().get("inputs")
        return inputs is not None and inputs == {
            "files": digest([dated_identity(path) for path in source.path]),
            "model": digest([dated_identity(model.path), _dump(model)]),
        }

    def _settings(self, section: Section) -> dict[str, Any]:
        """Return a section as what is made from it depends on it: without the places of files."""
        values = _dump(section)
        return values if self._dated else without(values, PLACES)

    def _placed(self, artifact: Artifact, usual: Artifact | None = None) -> Artifact:
        """Return a trial's artifact in a folder of its own, unless it is the base's ``usual`` one."""
        if self.base is not None and (usual is None or usual.fingerprint != artifact.fingerprint):
            (kind, *_), name, mark = relative(artifact.folder, self.root).parts, artifact.folder.name, artifact.fingerprint[:8]
            own = mark if kind == name else f"{name}-{mark}"
            artifact.folder = self.root / kind / own if kind == "selections" else self.root / "search" / kind / own
        return artifact

    @property
    def model(self) -> ModelRef:
        """The base model."""
        proxy = self.rows_of.config.scoring.proxy if self.rows_of else None
        return replace(ModelRef.of(self.config.model), layers=proxy.layers if proxy else None)

    @cached_property
    def proxied(self) -> Run | None:
        """What a cascade's proxy makes of this run's rows, in folders below ``proxy``; None where there is no cascade."""
        if self.config.scoring.proxy is None:
            return None
        return Run(proxy_config(self.config, self.selections), base=self.base and (self.base.proxied or self.base), rows_of=self)

    @cached_property
    def _model_identity(self) -> Any:
        return digest([self._file(self.config.model.path), self._settings(self.config.model), *filter(None, [self.model.layers])])

    @property
    def sources(self) -> dict[str, tuple[SourceConfig, bool]]:
        """Every set of rows by name, and whether its rows must have an answer."""
        return self.config.sources

    @cached_property
    def _files(self) -> dict[str, str]:
        """Source → digest of its files."""
        return {name: digest([self._file(path) for path in source.path]) for name, (source, _) in self.sources.items()}

    def ingested(self, name: str) -> Artifact:
        """Return the canonical rows of a source, in ``<folder>/rows``."""
        if self.rows_of:
            return self.rows_of.ingested(name)
        source, _ = self.sources[name]
        shards = self.config.data.shards if name == "candidates" else 1
        config: dict[str, Any] = {"source": self._settings(source), "shards": shards, "max_length": self.config.model.max_length}
        if self.config.model.template in ("auto", "chat"):  # version 0.1.0 ended every answer with EOS; all else is as it was
            config["turns"] = "as the chat template ends them"
        inputs = {"files": self._files[name], "model": self._model_identity}
        usual = self.base.ingested(name) if self.base and name in self.base.sources else None
        return self._placed(Artifact(self.root / "ingest" / name, "ingest", config, inputs), usual)

    @cached_property
    def planted(self) -> Artifact | None:
        """The halves of the trusted sets, and the planted rows made of one; None where no calibrated selection is asked for."""
        if not self.config.calibrated or self.rows_of:
            return self.rows_of.planted if self.rows_of else None
        inputs = {name: self.ingested(name).fingerprint for name in self.trusted_names}
        config = {"kinds": list(KINDS), "rows": self.config.selector.trusted_rows, "seed": self.config.seed}
        return self._placed(Artifact(self.root / "planted", "ingest", config, inputs), self.base.planted if self.base else None)

    @cached_property
    def overlap(self) -> Artifact:
        """Which sets share prompts; made where something is evaluated."""
        inputs = {name: self.ingested(name).fingerprint for name in self.sources}
        return self._placed(Artifact(self.root / "overlap", "ingest", {}, inputs), self.base.overlap if self.base else None)

    @property
    def trusted_names(self) -> list[str]:
        """The trusted sets that there are."""
        return [name for name in ("validation", "harmful", "benign") if name in self.sources]

    def trusted_rows(self, name: str) -> StoragePath:
        """Return the rows of a trusted set that selector and scorers may see: all, or what is not held out."""
        return self.planted.folder / "fit" / f"{name}.parquet" if self.planted else self.ingested(name).folder / "rows"

    @property
    def planted_rows(self) -> StoragePath | None:
        """The folder of the planted rows, if there are any."""
        return self.planted.folder / "rows" if self.planted else None

    @cached_property
    def fitted(self) -> Artifact:
        """The selector."""
        inputs = {name: self.ingested(name).fingerprint for name in ("candidates", *self.trusted_names)}
        inputs |= {"model": self._model_identity} | self._held_out
        config = {"selector": _dump(self.config.selector), "seed": self.config.seed}
        files = tuple(file for part in self.parts for file in part_files(self.config.selector, part))
        return self._placed(Artifact(self.root / "fit", "fit", config, inputs, files), self.base.fitted if self.base else None)

    @property
    def parts(self) -> list[str]:
        """The parts of the selector that the scorers ask for; no part changes with what others are made."""
        return parts_of(self.config.scoring.scorers, self.config.selector, last_layers=bool(self.config.scoring.last_layers))

    @property
    def needs_selector(self) -> bool:
        """Whether any scorer asks for a part of the selector."""
        return bool(self.parts)

    @property
    def _held_out(self) -> dict[str, str]:
        return {"planted": self.planted.fingerprint} if self.planted else {}

    @property
    def trusted(self) -> TrustedSets:
        """The trusted rows as scorers read them, as many as the selector takes, and the candidates."""
        folders = {name: str(self.trusted_rows(name)) for name in self.trusted_names}
        folders["candidates"] = str(self.ingested("candidates").folder / "rows")
        return TrustedSets(folders, self.config.selector.trusted_rows, self.config.seed, tuple(self.config.scoring.safe))

    @cached_property
    def scored(self) -> Artifact:
        """The scores, in ``<folder>/rows``."""
        if needs_model(self.config.scoring.scorers):
            inputs: dict[str, Any] = {"fit": self.fitted.fingerprint}
        else:
            inputs = {name: self.ingested(name).fingerprint for name in {"validation", "harmful", *self.config.scoring.safe}}
            inputs |= {"trusted_rows": self.config.selector.trusted_rows, "seed": self.config.seed}
        inputs |= {"candidates": self.ingested("candidates").fingerprint} | self._held_out
        asked = {"guard": "guard", "refusal_feature": "refusal_teacher"}  # by nobody else, or by a defence alone
        unasked = {key: None for scorer, key in asked.items() if scorer not in self.config.scoring.scorers}
        scoring = self.config.scoring.model_copy(update=unasked)
        for key, place in (("guard", scoring.guard and scoring.guard.path), ("refusal_teacher", scoring.refusal_teacher)):
            inputs |= {key: self._file(place)} if place else {}
        config = self._settings(scoring) | SCORERS.plugged(scoring.scorers)
        if self.proxied:
            config["passed_on"] = share_asked(self.config, {arm: self.turns(arm) for arm in self.selections})
            inputs["proxy"] = self.proxied.scored.fingerprint
        artifact = Artifact(self.root / "scores", "score", config, inputs)
        return self._placed(artifact, self.base.scored if self.base else None)

    def turns(self, arm: str) -> tuple[str, ...]:
        """Return the score columns that take turns in an arm; none where it is not the name of a scorer with several."""
        scoring = self.config.scoring
        several = parts_of_score(arm, scoring, self.config.selector) if arm in {*scoring.scorers} - {"random"} else ()
        return tuple(several)

    @cached_property
    def arms(self) -> list[str]:
        """The selections to compare, ``random`` replaced by its draws."""
        draws = [f"random_{draw}" for draw in range(self.config.scoring.random_draws)]
        names: list[str] = []
        for name in self.config.comparison.selections:
            head, plus, last = name.rpartition("+")
            names += [head + plus + draw for draw in draws] if last == "random" else [name]
        return list(dict.fromkeys(names))

    @cached_property
    def selections(self) -> list[str]:
        """The selections that are written: the main one, and those of the arms."""
        parts = (part for arm in self.arms for part in arm.split("+"))
        return [self.main_arm, *(part for part in dict.fromkeys(parts) if part not in (self.main_arm, "trusted", "none"))]

    def aligned_on(self, arm: str) -> list[Artifact]:
        """Return the artifacts whose ``rows`` an arm is aligned on: a selection, the trusted rows, both, or nothing."""
        parts = () if arm == "none" else arm.split("+")
        return [self.ingested("validation") if part == "trusted" else self.selected(part) for part in parts]

    def kept(self, arm: str) -> int:
        """Return the number of rows that an arm is aligned on."""
        return sum(count_rows(artifact.folder / "rows") for artifact in self.aligned_on(arm))

    def selected(self, arm: str) -> Artifact:
        """Return the curated subset of an arm."""
        # Everything is everything, whatever the rule.
        config: dict[str, Any] = {"scorer": arm} if arm == "all" else _dump(self.config.selection) | {"scorer": arm}
        for name in ("combinations", "export"):
            config.pop(name, None)
        if arm in self.config.selection.sums:
            config["weights"] = self.config.selection.sums[arm]
        folder = self.root / "selections" / folder_of(arm)
        return self._placed(Artifact(folder, "select", config, {"scores": self.scored.fingerprint}))

    @property
    def main_selection(self) -> Artifact:
        """The product's main output: the curated subset by the configured scorer."""
        return self.selected(self.main_arm)

    def exported(self, name: str) -> Artifact:
        """Return the main selection in a trainer's layout, beside its rows; it can be added later and changes no selection."""
        model, selection = self.config.model, self.main_selection
        config = {"export": name, "system": model.system, "plain": model.template == "plain"} | EXPORTS.plugged([name])
        return Artifact(selection.folder / "exports" / folder_of(name), "select", config, {"selection": selection.fingerprint})

    @property
    def main_arm(self) -> str:
        """The configured scorer, the first draw for random."""
        scorer = arm_of(self.config.selection.scorer)
        return "random_0" if scorer == "random" else scorer

    @property
    def variants(self) -> list[Variant]:
        """The aligned models."""
        comparison = self.config.comparison
        config = self.config
        pairs = [(arm, one) for one in config.defences for arm in self.arms if arm != "none" or one in config.unaligned]
        return [Variant(arm, defence, seed) for arm, defence in pairs for seed in comparison.seeds]

    def attacks_on(self, variant: Variant) -> list[Variant]:
        """Return an aligned model's attacked descendants."""
        return [replace(variant, attack=attack) for attack in self.config.attacks]

    def harmful(self, *, service: bool = False) -> str:
        """Return the source of the harmful rows that objectives look at, in alignment or in the service's fine-tune and repair."""
        if service and self.config.finetune.harmful is not None:
            return "finetune-harmful"
        return "harmful" if self.config.alignment.harmful is None else "align-harmful"

    def alignment(self, defence: str) -> dict[str, Any]:
        """Return what of the alignment section concerns a defence; the settings of others do not change its models."""
        described = settled(defence, self.config.alignment.parameters, "alignment")
        return _dump(self.config.alignment) | {"harmful": None} | described

    def safe_rows(self, selection: str) -> list[Artifact]:
        """Return the artifacts whose ``rows`` a fine-tune's defence of an arm may train on again."""
        if self.config.finetune.safe is not None:
            return [self.ingested("finetune-safe")]
        return self.aligned_on(selection) or [self.ingested("validation")]

    @property
    def verdicts(self) -> StoragePath:
        """The folder of what the guard has said of rows on their way into a fine-tune; its name tells guards apart."""
        guard = self.config.scoring.guard
        return self.root / "verdicts" / digest([self._settings(guard), self._file(guard.path)] if guard else None)[:16]

    def ordinary_rows(self, objective: str) -> list[Artifact]:
        """Return the artifacts whose ``rows`` an objective of the fine-tune looks at as trusted ordinary ones, if it does."""
        asked = "benign" in self.sources and asks_ordinary(objective, self.config.finetune.parameters)
        return [self.ingested("benign")] if asked else []

    def _service(self, objective: str, selection: str) -> tuple[dict[str, Any], dict[str, str]]:
        """Return what an objective of the fine-tune or of a repair is made from: its settings, and fingerprints of its rows."""
        sets = {"safe": self.safe_rows(selection), "ordinary": self.ordinary_rows(objective)}
        inputs = {name: digest([artifact.fingerprint for artifact in rows]) for name, rows in sets.items() if rows}
        if OBJECTIVES[objective].guarded:
            inputs["guard"] = self.verdicts.name
        if OBJECTIVES[objective].harmful != "none":
            inputs["service_harmful"] = self.ingested(self.harmful(service=True)).fingerprint
        return settled(objective, self.config.finetune.parameters, "finetune"), inputs

    def trained(self, variant: Variant) -> Artifact:
        """Return a variant's adapter (or model); the folder's name carries the fingerprint, so those of other settings stay."""
        config: dict[str, Any] = {"seed": variant.seed}
        stages, stage, place = variant.stages, "attack", "attack"
        if variant.attack is None:
            stage = place = "align"
            config |= {"alignment": self.alignment(stages.alignment)}
            if not weighed_in(self.config.alignment, variant.selection):
                config["alignment"].pop("weighted", None)
            rows = [artifact.fingerprint for artifact in self.aligned_on(variant.selection)]
            inputs = {"selection": rows[0] if len(rows) == 1 else digest(rows), "model": self._model_identity}
            if self.config.alignment.replay:
                inputs["replay"] = self.ingested("benign").fingerprint
            if OBJECTIVES[stages.alignment].harmful != "none":
                inputs["harmful"] = self.ingested(self.harmful()).fingerprint
        elif stages.repair != UNREPAIRED:
            place = "repair"
            config["repair"], inputs = self._service(stages.repair, variant.selection)
            inputs["attacked"] = self.trained(variant.unrepaired).fingerprint
        else:
            config |= {"attack": self._settings(variant.attack)}
            inputs = {
                "aligned": self.trained(variant.aligned).fingerprint,
                "task": self.ingested(f"attack-{variant.attack.name}-task").fingerprint,
                "harmful": self.ingested(f"attack-{variant.attack.name}-{variant.attack.attacker}").fingerprint,
            }
            if stages.finetune != PLAIN:
                config["finetune"], more = self._service(stages.finetune, variant.selection)
                inputs |= more
        artifact = Artifact(self.root / place / variant.name, stage, config, inputs)
        artifact.folder = self.root / place / f"{variant.name}-{artifact.fingerprint[:8]}"
        return artifact

    def model_of(self, variant: Variant) -> ModelRef:
        """Return a trained variant's model."""
        if variant.attack is None and variant.selection == "none":
            return self.model
        if variant.attack is None:
            return self.model.trained_in(self.trained(variant).folder / "run", self.config.alignment.train.weights)
        weights = variant.attack.train.weights
        if variant.stages.repair != UNREPAIRED:
            behind = OBJECTIVES[variant.stages.repair].prompt
            return self.unfinished(variant).trained_in(self.trained(variant).folder / "run", weights, prompt=behind)
        start = self.model if variant.attack.adapter == "same" and weights == "lora" else self.model_of(variant.aligned)
        return start.trained_in(self.trained(variant).folder / "run", weights)

    def unfinished(self, variant: Variant) -> ModelRef:
        """Return what a repair goes on from: the attacked model, less the attack's adapter, which is trained on."""
        attacked = self.model_of(variant.unrepaired)
        full = variant.attack is not None and variant.attack.train.weights == "full"
        return attacked if full else replace(attacked, adapters=attacked.adapters[:-1])

    @cached_property
    def evaluated(self) -> Artifact:
        """Answers, verdicts, ``summary.json`` and ``table.json``.

        Raises:
            ConfigError: The configuration has no ``evaluation`` section.
        """
        settings = self.config.require_evaluation()
        trained = [self.trained(c).fingerprint for variant in self.variants for c in (variant, *self.attacks_on(variant))]
        config: dict[str, Any] = {"draws": settings.bootstrap_draws, "cells": [variant.cell for variant in self.variants]}
        config |= {name: value for name in COLUMNS if (value := getattr(settings, name))}
        inputs = {"models": digest(trained), "asked": self._asked}
        return self._placed(Artifact(self.root / "evaluation", "evaluate", config, inputs))

    @cached_property
    def _asked(self) -> str:
        """What is asked and how it is judged, as a digest."""
        prompts = {name: self.ingested(name).fingerprint for name in ("eval-harmful", "eval-benign", "eval-task")}
        return digest(asked_of(self.config, prompts, self._settings, self._file))

    @property
    def judgements(self) -> StoragePath:
        """The folder of what endpoints replied as judges, by content: nothing is asked twice in a run directory."""
        return self.root / "judgements"

    def answers(self, variant: Variant) -> StoragePath:
        """Return the folder of a model's judged answers, which no other model's change."""
        return self.root / "answers" / f"{self.trained(variant).folder.name}-{digest(self._asked)[:8]}"


def _dump(section: Section) -> dict[str, Any]:
    return section.model_dump(mode="json")
