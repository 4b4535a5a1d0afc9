"""How the selector is fitted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pharmacist_ray.config.section import Count, Positive, Section, Share
from pharmacist_ray.config.training import TrainConfig

_TOV = TrainConfig(steps=20, lr=1e-3, batch_size=16)


class SealConfig(Section):
    """SEAL's bilevel selection (arXiv 2410.07471), which the `seal` scorer asks for."""

    steps: Count = 200
    """Steps; all together must meet every candidate once: steps × batch_size ≥ candidates (released code: 3 epochs)."""
    batch_size: Count = 32
    """Candidates and trusted rows per step each (released code: 64)."""
    lr: Positive = 1e-3
    """Learning rate of both adapters (ours, as the warm-up's; released code: 1e-5 with LoRA on models of 8 B)."""
    logits_lr: Positive = 5e-3
    """Learning rate of the logits (released code: 5e-3)."""
    safe_weight: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    """Weight s of the trusted loss; the rest is the candidates' (ours: the released code begins at 1 and takes .03 off an epoch)."""
    faithful_to: Literal["paper", "code"] = "paper"
    """`paper`: a row is judged by how much higher its loss is than at the optimum without trusted rows. `code`: by its loss alone, as
    the released code does, with one pass less."""


_SEAL = SealConfig()


class CoverageConfig(Section):
    """The groups of trusted rows that the `coverage` scorer has a direction for each."""

    groups: Annotated[int, Field(ge=2)] = 4
    """Number of groups (ours)."""
    by: Literal["gradients", "category"] = "gradients"
    """`gradients`: validation rows whose gradients point the same way are a group, found by k-means. `category`: their categories
    (`data.category_column`), several to a group where there are more."""


_COVERAGE = CoverageConfig()


class SelectorConfig(Section):
    """The Pharmacist selector (arXiv 2510.10085, Eq. 1–6 and Algorithm 1)."""

    mode: Literal["one_shot", "iterative"] = "one_shot"
    """What the `pharmacist` score is. `one_shot` computes the direction v at each checkpoint once and scores every row in one streaming
    pass (ours; scales to 10⁹ rows); `iterative` learns one logit per candidate (the paper's Algorithm 1). The scorer
    `pharmacist_iterative` gives the logits as a column beside the one-shot score."""
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
    """Iterations; iterative mode. All together must meet every candidate once: iterations × batch_size ≥ candidates."""
    batch_size: Count = 32
    """Candidates, validation rows and harmful rows per iteration each; iterative mode."""
    tokens_per_batch: Count = Field(default=4096, exclude_if=lambda value: value == 4096)
    """Padded tokens per pass when gradients are taken; halved where memory runs out. Activations are recomputed there if they are in
    the warm-up (`warmup.checkpointing`)."""
    baseline_decay: Share = 0.9
    """Decay of the moving average that stands for Σ_j γ_j s_j; iterative mode (ours: the batch mean is noisy)."""
    trusted_rows: Count = 200
    """At most so many validation and harmful rows, chosen by id (paper: 200)."""
    reference: TrainConfig | None = TrainConfig(steps=150, lr=1e-3, batch_size=16)
    """Tuning of the loss gap's reference on validation and benign rows (ours: 150 steps); only the `loss_gap` scorer needs it."""
    tov: TrainConfig = Field(default=_TOV, exclude_if=lambda value: value == _TOV)
    """Tuning of the `tov` scorer's reference on validation rows alone (ours: 20 steps; with many, what it measures is how well it
    remembers those rows)."""
    seal: SealConfig = Field(default=_SEAL, exclude_if=lambda value: value == _SEAL)
    """SEAL's bilevel selection; only the `seal` scorer needs it."""
    coverage: CoverageConfig = Field(default=_COVERAGE, exclude_if=lambda value: value == _COVERAGE)
    """Groups of trusted rows; only the `coverage` scorer needs them."""

    @model_validator(mode="after")
    def _checkpoints_lie_in_the_warmup(self) -> SelectorConfig:
        if sorted(set(self.checkpoints)) != self.checkpoints or self.checkpoints[-1] > self.warmup.steps:
            raise ValueError(
                f"selector.checkpoints must rise and end by selector.warmup.steps={self.warmup.steps}, got {self.checkpoints}"
            )
        trainings = [train for train in (self.warmup, self.reference, self.tov) if train is not None]
        if any(train.epochs for train in trainings):
            raise ValueError(
                "the selector's trainings are given in steps: epochs of selector.warmup, reference and tov must be null"
            )
        if any(train.weights == "full" for train in trainings):
            raise ValueError("the selector works on an adapter: weights of selector.warmup, reference and tov must be 'lora'")
        return self
