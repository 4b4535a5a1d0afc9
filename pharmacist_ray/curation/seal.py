"""SEAL's bilevel selection (arXiv 2410.07471): learn weights of the candidates under which tuning on them keeps the trusted loss low.

    min over ω, θ of  s · L_safe(θ) + (1 − s) [ L(ω, θ) − min over θ' of L(ω, θ') ],    L(ω, θ) = Σ_i σ_i ℓ_i(θ),  σ = softmax(ω)

by steps on all three: θ on the trusted and the weighted candidate loss, θ' on the weighted candidate loss alone, and

    ω_i ← ω_i − η σ_i (d_i − Σ_j σ_j d_j),    d_i = ℓ_i(θ) − ℓ_i(θ')

A row whose loss is higher where the trusted rows are learnt as well than where they are not goes down. The released code has no θ',
so d_i is ℓ_i(θ) there; `SealConfig.faithful_to` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from pharmacist_ray.config.schema import SealConfig
from pharmacist_ray.curation.selector import Point, batch_rows, draw, root_mean_square
from pharmacist_ray.data.batches import BatchOrder
from pharmacist_ray.data.render import Rendered


class BilevelSelector:
    """Logits of all candidates, θ (the point's own weights) and θ'; the same on every worker.

    The softmax is over the batch, and a step on ω is scaled by its root mean square over steps, as `IterativeSelector` does (ours).
    """

    def __init__(self, point: Point, candidates: int, config: SealConfig, seed: int) -> None:
        """Start with equal logits, and θ' = θ.

        Args:
            point: The model; its weights move.
            candidates: N.
            config: The settings.
            seed: Seed of the order of candidates and trusted rows.
        """
        self.config, self.seed = config, seed
        self.logits = torch.zeros(candidates)
        self.mean_square = 0.0
        self.iteration = 0
        self.safe: list[torch.Tensor] = list(point.parameters.values())
        self.user = [parameter.detach().clone() for parameter in self.safe]
        self.optimizers = [torch.optim.AdamW(tensors, lr=config.lr, weight_decay=0.0) for tensors in (self.safe, self.user)]

    def iterate(self, point: Point, candidates: Callable[[int], Rendered], validation: Sequence[Rendered]) -> dict[str, float]:
        """Do one iteration and return what to report: both levels' losses."""
        config, n = self.config, len(self.logits)
        size = batch_rows(n, config.batch_size, point.ranks.workers)
        rows = BatchOrder(n, size, self.seed).batch(self.iteration)
        batch = [candidates(row) for row in rows]
        index = torch.tensor(rows)
        sigma = torch.softmax(self.logits[index], dim=0)
        safe_losses, safe_gradient = point.losses_and_gradient(draw(validation, size, self.seed + 1, self.iteration))
        losses, gradient = point.losses_and_gradient(batch, sigma.tolist())
        difference = losses.cpu().float()
        steps: list[list[torch.Tensor]] = [
            [config.safe_weight * a + (1 - config.safe_weight) * b for a, b in zip(safe_gradient, gradient, strict=True)]
        ]
        if config.faithful_to == "paper":
            with self._user(point):
                theirs, gradient = point.losses_and_gradient(batch, sigma.tolist())
            difference = difference - theirs.cpu().float()
            steps.append(gradient)
        for (_, tensors, optimizer), gradients in zip(self._levels(), steps, strict=False):
            for tensor, one in zip(tensors, gradients, strict=True):
                tensor.grad = one
            optimizer.step()
            optimizer.zero_grad()
        # Rescaled by the batch size, so that the step does not shrink with it.
        descent = sigma * (difference - (sigma * difference).sum()) * len(rows)
        scale, self.mean_square = root_mean_square(descent, self.mean_square, self.iteration)
        self.logits.index_add_(0, index, descent, alpha=-config.logits_lr / scale)
        self.iteration += 1
        return {
            "iteration": self.iteration,
            "safe_loss": float(safe_losses.mean()),
            "user_loss": float((sigma * losses.cpu()).sum()),
        }

    def state(self) -> dict[str, torch.Tensor]:
        """Return everything that a resumed run needs, as tensors (safetensors can hold it)."""
        found = {
            "logits": self.logits.clone(),
            "iteration": torch.tensor(self.iteration),
            "mean_square": torch.tensor(self.mean_square, dtype=torch.float64),
        }
        for level, tensors, optimizer in self._levels():
            for number, tensor in enumerate(tensors):
                moments = {f"{level}.{number}.{name}": value.clone() for name, value in optimizer.state[tensor].items()}
                found |= {f"{level}.{number}": tensor.detach().cpu().clone()} | moments
        return found

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from a state."""
        self.logits.copy_(state["logits"])
        self.iteration = int(state["iteration"])
        self.mean_square = float(state["mean_square"])
        for level, tensors, optimizer in self._levels():
            for number, tensor in enumerate(tensors):
                with torch.no_grad():
                    tensor.copy_(state[f"{level}.{number}"])
                prefix = f"{level}.{number}."
                moments = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
                optimizer.state[tensor] = {
                    name: value if name == "step" else value.to(tensor.device) for name, value in moments.items()
                }

    def _levels(self) -> list[tuple[str, list[torch.Tensor], torch.optim.Optimizer]]:
        return [("safe", self.safe, self.optimizers[0]), ("user", self.user, self.optimizers[1])]

    @contextmanager
    def _user(self, point: Point) -> Iterator[None]:
        """Hold θ' in the model inside the block, and θ again after it."""
        kept = [parameter.detach().clone() for parameter in self.safe]
        with torch.no_grad():
            for parameter, tensor in zip(self.safe, self.user, strict=True):
                parameter.copy_(tensor)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, tensor in zip(self.safe, kept, strict=True):
                    parameter.copy_(tensor)
