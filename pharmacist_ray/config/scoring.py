"""Which scores are computed, and which rows are kept by them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pharmacist_ray.config.section import Count, Location, Positive, Section, Share

CALIBRATED = "calibrated"
"""The scorer that is made of the others by what they say about planted rows."""

COVERAGE = "coverage"
"""The scorer that writes a column for each group of trusted rows; selected by it, the groups take turns."""

STANDS_FOR = "stands_for"
"""Column of a cascade's score files: how many candidates a row's scores stand for. 1 for a row that was passed on, more for one of the
random sample that was not (the others like it, which the model never saw), and 0 for a row that the model never saw."""


def arm_of(scorer: str | list[str]) -> str:
    """Return the name of a selection by a score or by a list of scores, for folders and tables."""
    return scorer if isinstance(scorer, str) else "-".join(scorer)


def folder_of(name: str) -> str:
    """Return a name as folders have it, without the colon of ``module:attribute`` and the slash of ``sft/lisa``."""
    return name.replace(":", "-").replace("/", "-")


def tells_rows_apart(arm: str) -> bool:
    """Whether the rows of an arm of one part have a score that says which of them is better."""
    return arm not in ("all", "trusted", "none") and not arm.startswith("random_")


class PlantedConfig(Section):
    """Where planted labels are, in data of a benchmark."""

    column: str = "quality"
    """Column of the candidates."""
    good: Annotated[list[str], Field(min_length=1)]
    """The labels of rows that should be kept."""


class GuardConfig(Section):
    """A classifier of prompt and answer: any sequence classifier of transformers, from safetensors and without running its code."""

    path: str
    """Its folder."""
    unsafe: Annotated[list[str], Field(min_length=1)]
    """The labels that say unsafe. One probability over all labels: their sum counts; one each (`problem_type`
    multi_label_classification): the largest."""
    template: str = "{prompt}\n{answer}"
    """Its input; an end-of-sequence token follows, if its tokenizer has one."""
    max_length: Count = 512
    """Its longest input in tokens; the rest is cut off on the right."""


class ProxyConfig(Section):
    """A cheaper model that scores every candidate, so that the model to harden need only score those that may be among its best."""

    path: Location | None = None
    """Folder or hub id of a small model of the family; None: the model to harden itself, with what the other keys take from it."""
    layers: Count | None = None
    """Its first so many decoder layers alone."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Its base in 8 bits or in 4; see `model.quantization`."""
    miss: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02
    """Expected share of the model's own top rows that is lost at most; how many rows go on to the model is chosen by it."""
    sample: Count | None = None
    """Rows of the random sample that the model scores to find out how far down its top rows stand with the proxy; None: so many that 200 of
    its top rows are expected among them."""
    seed: int = 0
    """Seed of the random sample."""

    @model_validator(mode="after")
    def _cheaper(self) -> ProxyConfig:
        if self.path is None and self.layers is None and self.quantization is None:
            raise ValueError("scoring.proxy needs a path, layers or quantization: by what is it cheaper than the model?")
        return self


class ScoringConfig(Section):
    """Per-sample scores, computed by Ray Data actors."""

    scorers: Annotated[list[str], Field(min_length=1)] = ["pharmacist", "loss_gap", "random"]
    """Which scores to compute; `pharmacist plugins` lists all. One of your own is `module:attribute`."""
    method: Literal["hooks", "ghost", "difference"] = "hooks"
    """How influences are computed: per-sample gradients by hooks (exact), ghost products (exact), or a central difference."""
    last_layers: Count | None = Field(default=None, exclude_if=lambda value: value is None)
    """Take influences over the adapters of so many last decoder layers alone, weighed so that they come close to those of all: the backward
    pass ends there, in the first of them after its attention. None: all layers."""
    tokens_per_batch: Count = 4096
    """Padded tokens per batch; rows are bucketed by length. Halved where memory runs out, down to a single row."""
    checkpointing: bool = Field(default=False, exclude_if=lambda value: not value)
    """Recompute activations in the backward pass to save memory."""
    random_draws: Count = 3
    """Columns random_0, random_1, … that the `random` scorer writes."""
    seed: int = 0
    """Seed of the random scores."""
    safe: Annotated[list[Literal["validation", "benign"]], Field(min_length=1)] = Field(
        default=["validation"], exclude_if=lambda value: value == ["validation"]
    )
    """The trusted sets that representation, guard and naive_bayes tell harmful rows from; an audit takes ordinary rows too."""
    planted: PlantedConfig | None = Field(default=None, exclude_if=lambda value: value is None)
    """For the `oracle` scorer, on benchmarks alone: the column with planted labels, and which are good."""
    guard: GuardConfig | None = Field(default=None, exclude_if=lambda value: value is None)
    """For the `guard` scorer and the star_dss fine-tune: the classifier to ask. Without one the scorer trains a linear one on the
    validation and harmful rows."""
    refusal_teacher: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """For the `refusal_feature` scorer: the folder of a model, or of an adapter of the model to harden, whose states tell harmful prompts
    in the place of the base's: a Refusal-Teacher."""
    proxy: ProxyConfig | None = Field(default=None, exclude_if=lambda value: value is None)
    """Let a cheaper model score every candidate, and the model to harden a random sample and what that one ranks highest: a cascade."""


class SelectionConfig(Section):
    """Which rows are kept."""

    scorer: str | Annotated[list[str], Field(min_length=2)] = "pharmacist"
    """The score to rank by, highest first; of several, the sum of their ranks. `calibrated` keeps half of the trusted rows out of the
    fit, breaks them in known ways, and learns from them how to weigh the scores."""
    ratio: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.4
    """Share of the candidates to keep; exactly one of ratio, count and threshold is set."""
    count: Count | None = None
    """Number of rows to keep."""
    threshold: float | None = None
    """Keep the rows with at least this score."""
    quotas: dict[str, Share] | Literal["proportional"] = {}
    """Category → its share of the kept rows; `proportional` keeps each category's own share."""
    combinations: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], Annotated[dict[str, Positive], Field(min_length=1)]
    ] = Field(default={}, exclude_if=lambda value: not value)
    """Several scores as one: a name of yours → scorer → weight, for example `{rank_sum: {pharmacist: 1, loss_gap: 1}}`. A row's score
    is the weighted sum of its ranks by each; the name can then stand wherever a scorer's can."""
    near_duplicates: Count | None = Field(default=None, exclude_if=lambda value: value is None)
    """At most so many kept rows of a group of near-duplicates, the best ones. Which rows are such is estimated by MinHash over runs of
    three words of prompt and answer."""
    jsonl: bool = False
    """Also write `curated.jsonl` in the layout of the input."""
    export: list[str] = Field(default=[], exclude_if=lambda value: not value)
    """Write the selection by `scorer` for other trainers as well, each into `exports/NAME` beside its rows: `trl`, `trl_text` (for a
    model without a chat template), `messages`, `alpaca`, `sharegpt`, `llamafactory`, `axolotl`."""

    @model_validator(mode="after")
    def _one_rule(self) -> SelectionConfig:
        given = [name for name in ("ratio", "count", "threshold") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"set exactly one of selection.ratio, selection.count and selection.threshold, got {given or 'none'}"
            )
        if isinstance(self.scorer, list) and len(set(self.scorer)) != len(self.scorer):
            raise ValueError(f"the scores in selection.scorer must differ, got {self.scorer}")
        return self

    @property
    def sums(self) -> dict[str, dict[str, float]]:
        """Every sum of ranks by name: the combinations, and that of a list in `scorer`."""
        listed = {arm_of(self.scorer): dict.fromkeys(self.scorer, 1.0)} if isinstance(self.scorer, list) else {}
        return {**self.combinations, **listed}
