"""The Pharmacist selector's mathematics (arXiv 2510.10085, Eq. 1–6, Algorithm 1).

Weight the candidates so that the model they produce is still safe *after* one harmful gradient step:

    min_w  f( θ*(w) − α ∇h(θ*(w)) ),    θ*(w) = θ₀ − η_θ Σ_i γ_i ∇g_i(θ₀),    γ = softmax(w)

with f the loss on trusted safety samples, h on harmful ones, g_i on candidate i. To first order only one vector matters,
v = ∇f(θ'), and every candidate's influence s_i = ⟨∇g_i(θ₀), v⟩: a sample whose gradient lowers the post-attack validation loss more
than the average goes up. The paper carries a further factor (1 − α); to first order it is I − αH ≈ I, it only rescales, and for
α > 1 it would flip the sign, so it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pharmacist_ray.config.schema import SelectorConfig
from pharmacist_ray.data.batches import BatchOrder
from pharmacist_ray.data.render import Batch, Rendered
from pharmacist_ray.errors import ResourceError
from pharmacist_ray.models.budget import TokenBudget, TooLongError
from pharmacist_ray.models.influence import Directions, influence, influence_terms
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.models.modes import stand_still
from pharmacist_ray.models.perturb import global_norm, perturbed
from pharmacist_ray.runtime.ranks import Ranks

Collate = Callable[[list[Rendered]], Batch]

TINY = 1e-30
"""Stands for a norm of zero where something is divided by it, so that the quotient is zero and not NaN."""

DIRECTIONS = ("pharmacist", "no_attack")
"""What the rows of a direction tensor are: v at the configured α, and at α = 0 (LESS-style influence)."""

AT_CHECKPOINTS = ("directions", "groups")
"""Parts of a selector that are directions, one file a checkpoint."""

OF_LAST_LAYERS = {f"last_layers/{part}": part for part in AT_CHECKPOINTS}
"""Parts that say how those are weighed over the last layers alone (`curation.last_layers`)."""

PARTS = (*AT_CHECKPOINTS, *OF_LAST_LAYERS, "logits", "reference", "tov", "seal")
"""What a scorer can ask for: directions with their checkpoints, those of groups of trusted rows, both over the last layers alone, learnt
logits, the loss gap's reference, Train-on-Validation's, and SEAL's logits."""

LEARNT = ("logits", "seal")
"""Those that hold a logit for each candidate."""

_SCALE_DECAY = 0.999
"""Decay of the mean square by which a step on the logits is scaled (Adam's second moment's)."""


def checkpoint_name(step: int) -> str:
    """Return the name under which the adapter and the directions of a warm-up step are kept."""
    return f"step-{step:06d}"


def part_files(selector: SelectorConfig, part: str) -> list[str]:
    """Return the files of one of `PARTS`, without which it is not complete."""
    if part in AT_CHECKPOINTS:
        return [f"{part}/{checkpoint_name(step)}.safetensors" for step in selector.checkpoints]
    if part in OF_LAST_LAYERS:
        return [f"{part}.safetensors"]
    return [f"{part}.parquet"] if part in LEARNT else [f"{part}/adapter/adapter_model.safetensors"]


@dataclass(frozen=True)
class Point:
    """A model at θ₀ and what is needed to take gradients there."""

    model: Any
    parameters: dict[str, torch.nn.Parameter]
    """The adapter's parameters by name: the space in which everything here lives."""
    collate: Collate
    budget: TokenBudget
    """Tokens per pass."""
    ranks: Ranks

    @classmethod
    def at(cls, model: Any, collate: Collate, tokens_per_batch: int, ranks: Ranks) -> Point:
        """Return the point of a model without dropout; its trainable parameters are the space.

        The model may be spread over the workers (`training.sharded`), its trainable parameters not.
        """
        stand_still(model)
        space = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        from pharmacist_ray.models.load import is_sharded  # there since the model was loaded

        together = (ranks.rank, ranks.workers) if is_sharded(model) else None
        return cls(model, space, collate, TokenBudget(tokens_per_batch, together), ranks)

    def gradient(self, samples: Sequence[Rendered], weights: Sequence[float] | None = None) -> list[torch.Tensor]:
        """Return ∇ Σ_i c_i ℓ_i over all workers, one tensor per parameter; see `losses_and_gradient`."""
        return self.losses_and_gradient(samples, weights)[1]

    def losses_and_gradient(
        self, samples: Sequence[Rendered], weights: Sequence[float] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return ℓ_i (N,) and ∇ Σ_i c_i ℓ_i, one tensor per parameter, over all workers; every worker gets the same.

        Args:
            samples: All samples, the same list on every worker; each takes its share.
            weights: c_i; by default 1/N each, which gives the mean loss.

        Raises:
            ResourceError: A row does not fit in memory, even alone.
        """
        values = list(weights) if weights is not None else [1.0 / len(samples)] * len(samples)
        parameters = list(self.parameters.values())
        total = [torch.zeros_like(parameter) for parameter in parameters]
        found = torch.zeros(len(samples), device=self.ranks.device)
        # Workers who pass through the model together are dealt batches of all rows, the others take rows of their own.
        mine = range(len(samples)) if self.budget.together else range(self.ranks.rank, len(samples), self.ranks.workers)

        def add(batch: Batch, chunk: list[int]) -> None:
            losses = per_sample_nll(self.model, batch)[: len(chunk)]
            loss = (losses * torch.tensor([values[mine[i]] for i in chunk], device=losses.device)).sum()
            for sum_, gradient in zip(total, torch.autograd.grad(loss, parameters), strict=True):
                sum_ += gradient
            for place, value in zip(chunk, losses.detach().float(), strict=True):
                found[mine[place]] = value

        self._in_batches([samples[index] for index in mine], add)  # the sum does not depend on what shares a pass
        *total, found = (mean * self.ranks.workers for mean in self.ranks.mean([*total, found]))
        return found, total

    def influences(self, samples: Sequence[Rendered], v: Sequence[torch.Tensor], *, cosine: bool = False) -> torch.Tensor:
        """Return s_i = ⟨∇ℓ_i(θ₀), v⟩ for each sample (N,), on every worker; N must be a multiple of the number of workers.

        Args:
            samples: All samples, the same list on every worker; each takes its share.
            v: One tensor per parameter.
            cosine: Divide by ‖∇ℓ_i(θ₀)‖.

        Raises:
            ResourceError: A row does not fit in memory, even alone.
        """
        return self.along(samples, {name: tensor.unsqueeze(0) for name, tensor in zip(self.parameters, v, strict=True)}, cosine)[
            :, 0
        ]

    def along(self, samples: Sequence[Rendered], directions: Directions, cosine: bool = False) -> torch.Tensor:
        """Return ⟨∇ℓ_i(θ₀), v_k⟩ for each sample and direction (N, K); see `influences`."""

        def along(batch: Batch) -> torch.Tensor:
            found = influence(self.model, batch, directions, norms=cosine)
            norms = 1.0 if found.grad_norms is None else found.grad_norms.clamp_min(TINY)[:, None]
            return found.dots / norms

        return self._of_each(samples, along, len(next(iter(directions.values()))))

    def terms(self, samples: Sequence[Rendered], directions: Directions) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what each parameter adds to ⟨∇ℓ_i(θ₀), v_k⟩ (N, K, P) and to ‖∇ℓ_i(θ₀)‖² (N, P), in the order of the directions.

        Args:
            samples: As in `influences`.
            directions: Name → (K, *shape).
        """

        def terms(batch: Batch) -> torch.Tensor:
            dots, squares = influence_terms(self.model, batch, directions)
            return torch.cat([dots, squares[:, None]], dim=1)

        found = self._of_each(samples, terms, len(next(iter(directions.values()))) + 1, len(directions))
        return found[:, :-1], found[:, -1]

    def _of_each(self, samples: Sequence[Rendered], compute: Callable[[Batch], torch.Tensor], *shape: int) -> torch.Tensor:
        """Return what is computed of each sample, (N, *shape), on every worker; each takes its share."""
        share = len(samples) // self.ranks.workers
        mine = samples if self.budget.together else samples[self.ranks.rank * share : (self.ranks.rank + 1) * share]
        values = torch.zeros(len(mine), *shape, device=self.ranks.device)

        def take(batch: Batch, chunk: list[int]) -> None:
            values[chunk] = compute(batch)[: len(chunk)]

        self._in_batches(mine, take)
        return self.ranks.total(values) if self.budget.together else self.ranks.gather(values)

    def _in_batches(self, samples: Sequence[Rendered], use: Callable[[Batch, list[int]], None]) -> None:
        shortest = min(range(len(samples)), key=lambda index: len(samples[index].ids), default=0)

        def work(chunk: list[int]) -> None:
            use(self.collate([samples[index] for index in chunk or [shortest]]).to(self.ranks.device), chunk)

        try:
            self.budget.run([len(sample.ids) for sample in samples], work)
        except TooLongError as error:
            raise ResourceError(
                f"fit: a row cannot be passed through the model: {error}; set selector.warmup.checkpointing=true, lower "
                "model.max_length, or take larger GPUs"
            ) from None


def attacked_direction(point: Point, *, validation: Sequence[Rendered], **step: Any) -> list[torch.Tensor]:
    """Return v = ∇f(θ') (Algorithm 1, steps 3–5).

    Args:
        point: The model at θ₀.
        validation: Samples of f.
        step: What `attacked` takes.
    """
    with attacked(point, **step):
        return point.gradient(validation)


@contextmanager
def attacked(
    point: Point,
    *,
    harmful: Sequence[Rendered],
    inner: Sequence[torch.Tensor] | None,
    inner_lr: float,
    intensity: float,
    normalised: bool = True,
) -> Iterator[None]:
    """Hold the weights at θ' = θ* − α ∇h(θ*) with θ* = θ₀ − η_θ·inner inside the block (Algorithm 1, steps 3 and 4).

    The weights are θ₀ again afterwards, bit by bit.

    Args:
        point: The model at θ₀.
        harmful: Samples of h.
        inner: Σ_i γ_i ∇g_i(θ₀); None leaves the inner step out.
        inner_lr: η_θ.
        intensity: α; 0 leaves the simulated attack out.
        normalised: Step α∇h/‖∇h‖ (as Booster, arXiv 2409.01586) instead of α∇h.
    """
    parameters = list(point.parameters.values())
    with ExitStack() as moved:
        if inner is not None and inner_lr:
            moved.enter_context(perturbed(parameters, inner, -inner_lr))
        if intensity:
            attack = point.gradient(harmful)
            norm = float(global_norm(attack)) if normalised else 1.0
            if norm > 0:  # a harmful loss that is flat here has no direction to step in
                moved.enter_context(perturbed(parameters, attack, -intensity / norm))
        yield


def logit_gradient(
    influences: torch.Tensor, gamma: torch.Tensor, inner_lr: float, baseline: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Return the ascent direction of the logits, −∂f(θ')/∂w_i = η_θ γ_i (s_i − Σ_j γ_j s_j) (Algorithm 1, step 6).

    Args:
        influences: s (B,).
        gamma: γ (B,), sums to one.
        inner_lr: η_θ.
        baseline: Stands for Σ_j γ_j s_j; by default that sum.
    """
    return inner_lr * gamma * (influences - ((gamma * influences).sum() if baseline is None else baseline))


def root_mean_square(step: torch.Tensor, mean_square: float, iteration: int) -> tuple[float, float]:
    """Return the moving root mean square by which a step on the logits is divided, as Adam has it, and the mean square to go on with.

    Args:
        step: The batch's step (B,).
        mean_square: Of the steps before, moving, not yet freed of its start at zero.
        iteration: How many came before.
    """
    mean_square = _SCALE_DECAY * mean_square + (1 - _SCALE_DECAY) * float(step.double().square().mean())
    return max(math.sqrt(mean_square / (1 - _SCALE_DECAY ** (iteration + 1))), TINY), mean_square


def batch_rows(candidates: int, batch_size: int, workers: int) -> int:
    """Return how many candidates an iteration takes: at most ``batch_size``, and the same for every worker."""
    size = min(batch_size, candidates)
    return size - size % workers


class IterativeSelector:
    """Algorithm 1: one logit per candidate, learnt over iterations that each start from θ₀ again.

    γ is the softmax over the batch's logits, and a moving average stands for the batch's mean influence, which is noisy (ours). The
    logits are replicated on every worker and updated identically; only rows of the batch move.

    A step is η_w times the ascent direction over its root mean square: Adam with one second moment for all logits, and no first one.
    Adam's own, one per logit, would take the size out of every s_i (a row met once moves by ±η_w whatever its influence), and size is
    what rows are ranked by.
    """

    def __init__(self, candidates: int, config: SelectorConfig, seed: int) -> None:
        """Start with equal logits.

        Args:
            candidates: N.
            config: The selector's section.
            seed: Seed of the order of candidates, validation and harmful rows.
        """
        self.config = config
        self.logits = torch.zeros(candidates)
        self.mean_square = 0.0
        self.baseline: float | None = None
        self.iteration = 0
        self.seed = seed

    def iterate(
        self,
        point: Point,
        candidates: Callable[[int], Rendered],
        validation: Sequence[Rendered],
        harmful: Sequence[Rendered],
    ) -> dict[str, float]:
        """Do one iteration and return what to report: the mean influence and the norm of v."""
        config, n = self.config, len(self.logits)
        size = batch_rows(n, config.batch_size, point.ranks.workers)
        rows = BatchOrder(n, size, self.seed).batch(self.iteration)
        val = draw(validation, config.batch_size, self.seed + 1, self.iteration)
        harm = draw(harmful, config.batch_size, self.seed + 2, self.iteration)
        batch = [candidates(row) for row in rows]
        index = torch.tensor(rows)
        gamma = torch.softmax(self.logits[index], dim=0)
        inner = point.gradient(batch, gamma.tolist())
        v = attacked_direction(
            point,
            validation=val,
            harmful=harm,
            inner=inner,
            inner_lr=config.inner_lr,
            intensity=config.intensity,
            normalised=config.normalised,
        )
        influences = point.influences(batch, v, cosine=config.cosine).cpu().float()
        mean = float((gamma * influences).sum())
        self.baseline = (
            mean if self.baseline is None else config.baseline_decay * self.baseline + (1 - config.baseline_decay) * mean
        )
        # Rescaled by the batch size, so that the step does not shrink with it.
        ascent = logit_gradient(influences, gamma, config.inner_lr, self.baseline) * len(rows)
        scale, self.mean_square = root_mean_square(ascent, self.mean_square, self.iteration)
        self.logits.index_add_(0, index, ascent, alpha=config.logits_lr / scale)
        self.iteration += 1
        return {"iteration": self.iteration, "mean_influence": mean, "direction_norm": float(global_norm(v))}

    def state(self) -> dict[str, torch.Tensor]:
        """Return everything that a resumed run needs, as tensors (safetensors can hold it)."""
        return {
            "logits": self.logits.clone(),
            "iteration": torch.tensor(self.iteration),
            "mean_square": torch.tensor(self.mean_square, dtype=torch.float64),
            "baseline": torch.tensor(math.nan if self.baseline is None else self.baseline, dtype=torch.float64),
        }

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from a state."""
        self.logits.copy_(state["logits"])
        self.iteration = int(state["iteration"])
        self.mean_square = float(state["mean_square"])
        self.baseline = None if state["baseline"].isnan() else float(state["baseline"])


def draw(samples: Sequence[Rendered], size: int, seed: int, iteration: int) -> list[Rendered]:
    """Return the rows of a set that an iteration takes: so many of them, or all if there are fewer."""
    count = min(size, len(samples))
    return [samples[i] for i in np.random.default_rng([seed, iteration]).choice(len(samples), count, replace=False)]
