"""One model per stage. Every field has its unit and the source of its default under it.

All models are frozen and refuse unknown keys. What can be checked from the configuration alone is checked here, so that a mistake is
found before Ray starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    model_validator,
)

from pharmacist_ray.errors import ConfigError
from pharmacist_ray.storage.paths import RemotePath, StoragePath, refuse_credentials, storage_path

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _without_credentials(path: str) -> str:
    try:
        refuse_credentials(path)
    except ConfigError as error:  # for pydantic, which collects what is wrong
        raise ValueError(str(error)) from None
    return path


def _place(value: object) -> StoragePath:
    if not isinstance(value, str | Path | RemotePath):
        raise ValueError("run_dir must be a folder or a URI")
    try:
        return storage_path(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None


Location = Annotated[str, AfterValidator(_without_credentials)]
Paths = Annotated[list[Location], BeforeValidator(_as_list), Field(min_length=1)]
RunDir = Annotated[Path | RemotePath, PlainValidator(_place), PlainSerializer(str)]


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, docstrings become descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class SourceConfig(Section):
    """Where rows come from and how they look."""

    path: Paths
    """File, glob, folder, URI (s3://, gs://) or Hugging Face data set; one or a list."""
    layout: Literal["auto", "prompt_response", "instruction", "messages", "prompt_completion"] = "auto"
    """How a record is laid out; `auto` decides by its keys."""
    columns: dict[str, str] = {}
    """Your column names, where they differ: canonical name (prompt, response, input) → column."""
    category_column: str = "category"
    """The column with a row's category, for per-category quotas; may be absent from the data."""
    split: str = "train"
    """The split of a Hugging Face data set."""


class LoraConfig(Section):
    """The low-rank adapter."""

    r: Count = 8
    """Rank (Vaccine and T-Vaccine public code: 8)."""
    alpha: Positive = 16.0
    """Scale numerator: the update is alpha / r · B·A (ours; published values range from 4/32 to 2)."""
    dropout: Share = 0.0
    """Dropout on the adapter's input; 0 so that paired passes see one network (ours)."""
    targets: str | list[str] = "all-linear"
    """Names of the linear modules that get an adapter, or `all-linear`."""


class ModelConfig(Section):
    """The model to harden."""

    path: Location
    """Folder, hub id or URI of a causal language model with safetensors weights."""
    template: Literal["auto", "chat", "alpaca", "plain"] = "auto"
    """Prompt template; `auto` takes the model's chat template, else Alpaca's."""
    max_length: Count = 256
    """Longest sequence in tokens, prompt and answer together (Booster's public code: 256)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the base weights; adapters are float32 always."""
    lora: LoraConfig = LoraConfig()
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings along. Leave it off unless you have read that code."""


class DataConfig(Section):
    """The candidates to curate and the trusted sets to judge them by."""

    candidates: SourceConfig
    """The alignment samples of mixed quality: prompt → safe answer."""
    validation: SourceConfig
    """Trusted safety samples, disjoint from the candidates (paper: 200)."""
    harmful: SourceConfig
    """Harmful prompt → harmful answer, for the simulated attack (paper: 200). Never the attacker's data, never test prompts."""
    benign: SourceConfig | None = None
    """Trusted ordinary prompt → helpful answer; for the loss gap's reference and for replay."""
    shards: Count | None = None
    """Shards of the candidates; default: one per 16 MB of input, at least 8. Never depends on the number of workers."""


class TrainConfig(Section):
    """How one training run optimises."""

    steps: Count = 100
    """Optimiser steps."""
    epochs: Positive | None = None
    """Passes over the rows, in the place of steps, so that fewer rows take less time; for alignment.train and attacks (replay rows
    do not count)."""
    batch_size: Count = 10
    """Rows per optimiser step, over all workers and accumulation (git-disl public code: 10)."""
    accumulation: Count = 1
    """Micro-batches per optimiser step on each worker."""
    lr: Positive = 1e-3
    """Peak learning rate (Vaccine's public code: 1e-3)."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning-rate schedule after the warm-up (Booster: constant)."""
    warmup: Share = 0.0
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's decoupled weight decay (public code: 0.1)."""
    clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Global gradient norm above which a step is scaled down; 0 turns it off."""
    weights: Literal["lora", "full"] = "lora"
    """Train a fresh adapter, or all weights."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: 0 replicates, 1 shards optimiser state, 2 shards gradients too, 3 shards the model too, which is then
    whole on no worker, neither while it loads."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lives in CPU memory: the optimiser's state (zero_stage 1 to 3), or the sharded model too (zero_stage 3)."""
    checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    save_every: Annotated[int, Field(ge=0)] = 200
    """Optimiser steps between two saved states that an interrupted run goes on from; 0 keeps none."""

    @model_validator(mode="after")
    def _offload_needs_shards(self) -> TrainConfig:
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"offload={self.offload} needs zero_stage {needed} or higher, got zero_stage={self.zero_stage}")
        return self


class SelectorConfig(Section):
    """The Pharmacist selector (arXiv 2510.10085, Eq. 1–6 and Algorithm 1)."""

    mode: Literal["one_shot", "iterative"] = "one_shot"
    """`one_shot` computes the direction v at each checkpoint once and scores every row in one streaming pass (ours; scales to
    10⁹ rows); `iterative` learns one logit per candidate (the paper's Algorithm 1)."""
    warmup: TrainConfig = TrainConfig(steps=20, lr=1e-3, batch_size=16)
    """SFT on candidates before anything else: LoRA's B starts at zero, and without it the gradient on A vanishes. (Paper: 200
    steps. On real text an early checkpoint ranks better; the simulated attack pays where the model has come to refuse nearly
    everything, which takes longer. Ours.)"""
    checkpoints: Annotated[list[Count], Field(min_length=1)] = [20]
    """Warm-up steps after which a checkpoint θ_k is kept; one-shot influence is summed over them."""
    intensity: Annotated[float, Field(ge=0.0)] = 0.1
    """Perturbation intensity α of the simulated harmful step; 0 leaves the attack out. Above 1 the ranking decays to chance."""
    normalised: bool = True
    """Take the step α∇h/‖∇h‖ (as Booster does) instead of α∇h, so that α means the same across models."""
    inner_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """η_θ, the inner step on the weighted candidates; in one-shot mode γ is uniform and 0 leaves it out."""
    cosine: bool = False
    """Divide each influence by the sample's gradient norm: against a bias to samples with large gradients."""
    logits_lr: Positive = 5e-3
    """η_w; iterative mode. Adam with one second moment shared by all logits, so that a step follows the size of s_i (ours)."""
    iterations: Count = 200
    """Iterations; iterative mode."""
    batch_size: Count = 32
    """Candidates, validation rows and harmful rows per iteration each; in one-shot mode rows per pass."""
    baseline_decay: Share = 0.9
    """Decay of the moving average that stands for Σ_j γ_j s_j; iterative mode (ours: the batch mean is noisy)."""
    trusted_rows: Count = 200
    """At most so many validation and harmful rows, chosen by id (paper: 200)."""
    reference: TrainConfig | None = TrainConfig(steps=150, lr=1e-3, batch_size=16)
    """Tuning of the loss gap's reference on validation and benign rows (ours: 150 steps); null leaves the reference out."""

    @model_validator(mode="after")
    def _checkpoints_lie_in_the_warmup(self) -> SelectorConfig:
        if sorted(set(self.checkpoints)) != self.checkpoints or self.checkpoints[-1] > self.warmup.steps:
            raise ValueError(
                f"selector.checkpoints must rise and end by selector.warmup.steps={self.warmup.steps}, got {self.checkpoints}"
            )
        if self.warmup.epochs or (self.reference is not None and self.reference.epochs):
            raise ValueError(
                "the selector's trainings are given in steps: selector.warmup.epochs and reference.epochs must be null"
            )
        if self.warmup.weights == "full" or (self.reference is not None and self.reference.weights == "full"):
            raise ValueError("the selector works on an adapter: selector.warmup.weights and reference.weights must be 'lora'")
        return self


class ScoringConfig(Section):
    """Per-sample scores, computed by Ray Data actors."""

    scorers: Annotated[list[str], Field(min_length=1)] = ["pharmacist", "loss_gap", "random"]
    """Which scores to compute; `pharmacist doctor` lists all."""
    method: Literal["hooks", "ghost", "difference"] = "hooks"
    """How influences are computed: per-sample gradients by hooks (exact), ghost products (exact), or a central difference."""
    tokens_per_batch: Count = 4096
    """Padded tokens per batch; rows are bucketed by length."""
    random_draws: Count = 3
    """Columns random_0, random_1, … that the `random` scorer writes."""
    seed: int = 0
    """Seed of the random scores."""


class SelectionConfig(Section):
    """Which rows are kept."""

    scorer: str = "pharmacist"
    """The score to rank by, highest first."""
    ratio: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.4
    """Share of the candidates to keep; exactly one of ratio, count and threshold is set."""
    count: Count | None = None
    """Number of rows to keep."""
    threshold: float | None = None
    """Keep the rows with at least this score."""
    quotas: dict[str, Share] | Literal["proportional"] = {}
    """Category → its share of the kept rows; `proportional` keeps each category's own share."""
    jsonl: bool = False
    """Also write `curated.jsonl` in the layout of the input."""

    @model_validator(mode="after")
    def _one_rule(self) -> SelectionConfig:
        given = [name for name in ("ratio", "count", "threshold") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"set exactly one of selection.ratio, selection.count and selection.threshold, got {given or 'none'}"
            )
        return self


class AlignmentConfig(Section):
    """Alignment of the base model on a selection."""

    objective: str = "sft"
    """What a step minimises, the defence; `pharmacist doctor` lists all."""
    parameters: dict[str, dict[str, Any]] = {}
    """Settings of objectives by name, for example `{vaccine: {rho: 2.0}, booster: {lambda: 5, alpha: 0.1}}`; the defaults are the
    papers', and `pharmacist doctor` lists them."""
    harmful: SourceConfig | None = None
    """Harmful prompt → harmful answer, for objectives that look at harm (T-Vaccine, RepNoise, Booster); default: data.harmful.
    RepNoise uses those whose prompt is among the alignment rows. Never the attacker's data, never test prompts."""
    train: TrainConfig = TrainConfig(steps=200)
    replay: Annotated[int, Field(ge=0)] = 0
    """Trusted benign rows replayed during alignment, the same ones for every arm; needs data.benign."""
    replay_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.3
    """Share of every batch that is replay, whatever the size of the arm, so that no arm wins by refusing everything (ours)."""


class AttackConfig(Section):
    """A harmful fine-tune: what a user of a fine-tuning service might do."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    """Names the attack in tables and folders."""
    task: SourceConfig
    """The user's own task, training rows."""
    harmful: SourceConfig
    """Harmful prompt → harmful answer rows of the attacker; disjoint from data.harmful."""
    rows: Count = 200
    """Samples n in the fine-tune (published: 1000)."""
    harmful_share: Share = 0.1
    """Share p of them that is harmful (published default: 0.1)."""
    adapter: Literal["fresh", "same"] = "fresh"
    """A fresh adapter on the merged model, or training of the alignment's own adapter goes on."""
    train: TrainConfig = TrainConfig(steps=100, lr=1e-5)


class TaskEvaluation(Section):
    """Accuracy on the user's task."""

    source: SourceConfig
    """Test rows: prompt → expected answer."""
    checker: Literal["exact", "contains", "number"] = "exact"
    """How an answer is compared with the expected one; `exact` and `contains` are reported both."""


class EvaluationConfig(Section):
    """What is asked and how answers are judged."""

    harmful_prompts: SourceConfig
    """Harmful prompts never trained on."""
    benign_prompts: SourceConfig
    """Ordinary prompts, for over-refusal."""
    task: TaskEvaluation
    judge: str = "phrases"
    """Which judge; `pharmacist doctor` lists all."""
    judge_path: Location | None = None
    """The judge's model folder (classifier) or world file (testbed)."""
    max_new_tokens: Count = 128
    """Longest answer in tokens (Vaccine's public code: 128)."""
    batch_size: Count = 64
    """Prompts per generation batch."""
    bootstrap_draws: Count = 2000
    """Draws of the bootstrap over samples and seeds."""


class ComparisonConfig(Section):
    """Which arms are aligned, attacked and evaluated."""

    selections: Annotated[list[str], Field(min_length=1)] = ["pharmacist"]
    """`all`, or the name of a scorer; `random` stands for its draws."""
    defences: list[str] = []
    """Objectives, each crossed with each selection; default: alignment.objective alone."""
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    """Alignment seeds; every arm is aligned and attacked once per seed."""


class TrackingConfig(Section):
    """Where training curves go besides the run's own files."""

    to: list[str] = []
    """Any of tensorboard, wandb, mlflow; the last two must be installed (`pip install 'pharmacist-ray[tracking]'`)."""
    project: str = "pharmacist"
    """Project (W&B) or experiment (MLflow)."""


class ResourcesConfig(Section):
    """What the run may use. Nothing is guessed from the machine that starts it."""

    workers: Annotated[int, Field(ge=0)] = 1
    """Ray Train workers of one training run; 0 trains in the stage's own process, as Ray Train's local mode does, without a GPU: small
    models then start at once, but what ends that process ends the stage, and the same command goes on."""
    parallel_runs: Count = 1
    """Training runs at the same time (arms × seeds are independent)."""
    actors: Annotated[int, Field(ge=0)] = 1
    """Ray Data actors for scoring and for evaluation; 0 does both in the stage's own process, as for `workers`."""
    cpus_per_worker: Positive = 1.0
    """CPUs of a training worker or an actor."""
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs of a training worker or an actor; 0 runs on the CPU."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures that a training run survives."""

    @model_validator(mode="after")
    def _can_be_given(self) -> ResourcesConfig:
        if not self.workers and (self.gpus_per_worker or self.parallel_runs > 1):
            raise ValueError(
                "resources.workers=0 trains in one process that has no GPU; it needs gpus_per_worker=0 and parallel_runs=1"
            )
        if not self.actors and self.gpus_per_worker:
            raise ValueError("resources.actors=0 scores and evaluates in one process that has no GPU; it needs gpus_per_worker=0")
        if self.gpus_per_worker > 1 and not float(self.gpus_per_worker).is_integer():
            raise ValueError("resources.gpus_per_worker above 1 must be a whole number")
        return self


class RangeConfig(Section):
    """Numbers between two ends, both included; whole numbers if the ends are."""

    low: int | float
    """The lowest number."""
    high: int | float
    """The highest number."""
    log: bool = False
    """Draw evenly on the logarithmic scale."""
    step: int | float | None = None
    """Draw multiples of this only."""

    @model_validator(mode="after")
    def _can_be_drawn_from(self) -> RangeConfig:
        if not self.low < self.high:
            raise ValueError(f"a range needs low < high, got {self.low} and {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a range with log=true needs low above 0 and no step")
        if self.step is not None and (self.step <= 0 or any(abs(x / self.step - round(x / self.step)) > 1e-9 for x in self.ends)):
            raise ValueError(f"the ends of a range must be multiples of its step, got {self.low}, {self.high} and {self.step}")
        return self

    @property
    def ends(self) -> tuple[int | float, int | float]:
        """Low and high."""
        return self.low, self.high

    @property
    def whole(self) -> bool:
        """Whether whole numbers are drawn."""
        return all(isinstance(one, int) for one in (*self.ends, 0 if self.step is None else self.step))


class EarlyConfig(Section):
    """The early look at a trial: the harmful score after one attack of the suite, on a part of the harmful prompts."""

    attack: str | None = None
    """Name of the attack; default: the first of `attacks`. It should tell settings apart: after a weak one all score alike."""
    prompts: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    """Share of the harmful prompts that are asked, the same ones in every trial (ours)."""
    reduction_factor: Annotated[float, Field(gt=1.0)] = 2.0
    """ASHA keeps a trial that is among the best 1/reduction_factor of those looked at before it (Ray Tune: 4; ours keeps half)."""


class SearchConfig(Section):
    """Which settings `pharmacist search` tries. A trial is a selection, aligned, attacked by every attack, and evaluated."""

    space: Annotated[dict[str, list[Any] | RangeConfig], Field(min_length=1)]
    """Dotted key of this file → the values to try, or `{low: 0.1, high: 1.0, log: true}` to draw from (not for grid)."""
    algorithm: Literal["grid", "random", "tpe", "nsga2"] = "grid"
    """`grid` tries every combination, `random` draws; `tpe` and `nsga2` are Optuna's, with four objectives: worst harmful score,
    task accuracy, over-refusal and seconds of alignment."""
    trials: Count | None = None
    """How many settings are tried; grid tries all."""
    concurrent: Count = 1
    """Trials at the same time; each needs the workers and actors of `resources`."""
    seed: int = 0
    """Seed of the draws."""
    selection: str | None = None
    """What trials align on: `all`, or the name of a scorer; default: selection.scorer."""
    tolerance: Share = 0.05
    """A recommended setting loses at most this much task accuracy to the most accurate trial, and refuses at most this share more
    of the ordinary prompts than the trial that refuses the fewest (ours)."""
    time_tolerance: Annotated[float, Field(ge=0.0)] = 0.5
    """Alignment times that differ by at most this share count as equal on the Pareto front (ours: on a shared machine the same number
    of steps took up to 1.35 times as long). On machines of your own, 0.1 may do; 0 compares seconds as they are."""
    scheduler: Literal["none", "asha"] = "none"
    """`asha` stops trials whose early look is bad, by Ray Tune's asynchronous successive halving; grid and random only. Look at
    `pharmacist search --agreement` first: it says whether the early look ranks trials as their final score does."""
    early: EarlyConfig = EarlyConfig()

    @model_validator(mode="after")
    def _space_fits_the_algorithm(self) -> SearchConfig:
        ranges = [key for key, choice in self.space.items() if isinstance(choice, RangeConfig)]
        if self.algorithm == "grid" and ranges:
            raise ValueError(f"search.algorithm=grid needs lists of values, but search.space.{ranges[0]} is a range")
        if (self.algorithm == "grid") != (self.trials is None):
            what = "search.trials must be null: a grid tries every combination" if self.trials else "search.trials must be set"
            raise ValueError(f"with search.algorithm={self.algorithm}, {what}")
        if self.scheduler == "asha" and self.algorithm in ("tpe", "nsga2"):
            raise ValueError(
                f"search.scheduler=asha stops trials by one number, but search.algorithm={self.algorithm} weighs four against each "
                "other; set search.scheduler=none, or algorithm=grid or random"
            )
        for key, choice in self.space.items():
            if isinstance(choice, list) and (not choice or any(one in choice[:place] for place, one in enumerate(choice))):
                raise ValueError(f"search.space.{key} must be a list of at least one value, all different, got {choice}")
        return self


class Config(Section):
    """A whole run."""

    run_dir: RunDir
    """Where every artifact of the run goes: a folder that all nodes reach, or a URI (s3://bucket/folder, gs://, hdfs://)."""
    seed: int = 0
    """Seed of the selector: warm-up order and adapter initialisation."""
    model: ModelConfig
    data: DataConfig
    resources: ResourcesConfig = ResourcesConfig()
    selector: SelectorConfig = SelectorConfig()
    scoring: ScoringConfig = ScoringConfig()
    selection: SelectionConfig = SelectionConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    attacks: list[AttackConfig] = []
    """Harmful fine-tunes that every aligned model goes through; none is allowed."""
    evaluation: EvaluationConfig | None = None
    comparison: ComparisonConfig = ComparisonConfig()
    tracking: TrackingConfig = TrackingConfig()
    search: SearchConfig | None = None
    """Settings to try against each other, for example `{space: {selection.ratio: [0.2, 0.4], selector.intensity: [0.05, 0.5]}}`."""

    @property
    def defences(self) -> list[str]:
        """The objectives that are compared."""
        return list(dict.fromkeys(self.comparison.defences)) or [self.alignment.objective]

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        if problems := list(self._disagreements()):
            raise ValueError("; ".join(problems))
        return self

    def _disagreements(self) -> Iterator[str]:
        if "loss_gap" in self.scoring.scorers and (self.data.benign is None or self.selector.reference is None):
            yield "the loss_gap scorer needs data.benign and selector.reference; add them or take loss_gap out of scoring.scorers"
        if self.selector.mode == "iterative" and not self.selector.inner_lr:
            yield "selector.mode=iterative needs selector.inner_lr above 0: with no inner step no logit ever moves"
        if self.alignment.replay and self.data.benign is None:
            yield "alignment.replay needs data.benign; add it or set alignment.replay=0"
        share, size = self.alignment.replay_share, self.alignment.train.batch_size
        if self.alignment.replay and round(share * size) >= size:
            yield f"alignment.replay_share={share:g} leaves no alignment row in a batch of {size}; lower it"
        for what, given in (
            ("attack names", [attack.name for attack in self.attacks]),
            ("comparison.seeds", self.comparison.seeds),
        ):
            if len(set(given)) != len(given):
                yield f"{what} must differ, got {given}"
        known = {*self.scoring.scorers, "all"}
        for name in dict.fromkeys((self.selection.scorer, *self.comparison.selections)):
            if name not in known:
                yield f"selection '{name}' is not among scoring.scorers; scored: {', '.join(sorted(known - {'all'}))}"
        for attack in self.attacks:
            if attack.adapter == "same" and "full" in (self.alignment.train.weights, attack.train.weights):
                yield f"attack '{attack.name}' has adapter=same, which needs weights=lora in alignment.train and in its own train"
        for where, train in self.trainings().items():
            share = max(1, self.resources.workers) * train.accumulation
            if train.batch_size % share:
                yield f"{where}.batch_size={train.batch_size} must be a multiple of resources.workers × accumulation = {share}"
            if train.weights == "full" and self.model.dtype != "float32" and train.zero_stage == 0:
                yield f"{where}: full weights in {self.model.dtype} need zero_stage 1 or higher, which keeps float32 masters"

    def trainings(self) -> dict[str, TrainConfig]:
        """Return every training section by its dotted name."""
        found = {"selector.warmup": self.selector.warmup, "alignment.train": self.alignment.train}
        if self.selector.reference is not None:
            found["selector.reference"] = self.selector.reference
        for index, attack in enumerate(self.attacks):
            found[f"attacks.{index}.train"] = attack.train
        return found
