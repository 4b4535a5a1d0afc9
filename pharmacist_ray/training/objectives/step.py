"""What an objective sees of one optimiser step, and how it is listed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import torch

from pharmacist_ray.config.endpoint import EndpointConfig
from pharmacist_ray.config.section import Section
from pharmacist_ray.data.render import Batch, Renderer
from pharmacist_ray.data.schema import Row
from pharmacist_ray.models.losses import answer_log_probs, kl_divergence, per_sample_nll
from pharmacist_ray.models.modes import without_dropout
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.training.weights import release_gathered

S = TypeVar("S", bound=Section)


def setting(settings: Mapping[type[Section], Section], kind: type[S]) -> S:
    """Return the settings of a kind, or its defaults."""
    found = settings.get(kind, kind())
    assert isinstance(found, kind)
    return found


@dataclass
class Step:
    """One optimiser step on one worker."""

    number: int
    """Counted from 0."""
    engine: Any
    """The DeepSpeed engine; forward passes whose loss is yielded go through it."""
    ranks: Ranks
    batches: Sequence[Batch]
    """This worker's micro-batches of alignment rows, all of the same number of rows."""
    positions: Sequence[Sequence[int]]
    """Micro-batch → places of its rows in the step's whole batch, which no number of workers changes."""
    seed: int
    renderer: Renderer | None = None
    """Turns text into token ids as the model reads it."""
    settings: Mapping[type[Section], Section] = field(default_factory=dict)
    harmful: Sequence[Batch] = ()
    """As many micro-batches of harmful rows, where the objective asks for them."""
    safe: Sequence[Batch] = ()
    """As many micro-batches of safe rows beside those of a fine-tune, where the objective asks for them."""
    ordinary: Sequence[Batch] = ()
    """As many micro-batches of trusted ordinary rows, where the objective asks for them."""
    rows: Sequence[Sequence[int]] = ()
    """Micro-batch → numbers of its rows in the training set."""
    verdicts: Sequence[torch.Tensor] = ()
    """Row of the training set → a guard's probability that it is safe up to each of its answer's tokens, where the objective asks it."""
    set_size: int = 0
    """Rows of the training set."""
    total: int = 1
    """Steps of the whole run."""
    merged: Sequence[str] = ()
    """Adapter folders that are merged into the frozen weights, the last one last."""
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    """What lives across steps; saved and restored with a checkpoint."""
    measured: dict[str, float] = field(default_factory=dict)
    """Further numbers for the training curve."""
    frozen: Collection[str] = ()
    """Names of parameter groups that this step leaves as they are, to the bit."""
    forwards: int = 0
    """Forward passes so far."""

    @property
    def model(self) -> Any:
        """The bare model, for passes on the side whose gradients never reach the engine."""
        return self.engine.module

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def get(self, kind: type[S]) -> S:
        """Return the settings of a kind, or its defaults."""
        return setting(self.settings, kind)

    def loss(self, batch: Batch, *, aside: bool = False) -> torch.Tensor:
        """Return the mean over samples of their mean token losses, each times its weight where the batch has weights.

        The sum is over the number of samples and not over their weights, so neither micro-batches nor workers change it.

        Args:
            batch: A micro-batch.
            aside: Whether the pass is not for the engine to differentiate.
        """
        self.forwards += 1
        losses = per_sample_nll(self.model if aside else self.engine, batch)
        return (losses if batch.weights is None else batch.weights * losses).mean()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Let the bare model be, inside a block, what it was before a fresh adapter came onto it."""
        with self.model.disable_adapter():
            yield

    def divergence(self, batch: Batch, *, temperature: float = 1.0, aside: bool = False) -> torch.Tensor:
        """Return the mean over samples of KL(p_before ‖ p_now) on their answers, without dropout, times the squared temperature of both.

        Args:
            batch: A micro-batch.
            temperature: T; 1 leaves both as they are.
            aside: Whether the pass is not for the engine to differentiate.
        """
        with without_dropout(self.model):
            with torch.no_grad(), self.reference():
                before, _ = answer_log_probs(self.model, batch)
            release_gathered(self.engine)
            self.forwards += 2
            now, mask = answer_log_probs(self.model if aside else self.engine, batch)
        if temperature != 1.0:
            before, now = (torch.log_softmax(one / temperature, dim=-1) for one in (before, now))
        return temperature**2 * kl_divergence(before, now, mask).mean()

    @contextmanager
    def same_dropout(self, what: str, micro_batch: int) -> Iterator[None]:
        """Fix the random generators inside a block, so that paired passes over a micro-batch see one network.

        A function of seed, step, worker and micro-batch alone, so a resumed run needs no generator's state.

        Args:
            what: Names the data, so that different data draw differently.
            micro_batch: Its number in the step.
        """
        devices = [self.ranks.device] if self.ranks.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(mixed_seed(self.seed, self.number, self.ranks.rank, what, micro_batch))
            yield

    @contextmanager
    def changed_gradients(self, change: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
        """Change parameters' gradients on their way to the engine inside a block, whatever shards them.

        Args:
            change: Parameter name → function of the whole gradient of one micro-batch on this worker.
        """
        parameters = dict(self.model.named_parameters())
        handles = [parameters[name].register_hook(function) for name, function in change.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def added_gradients(self, terms: Mapping[str, torch.Tensor], factor: float = 1.0) -> Iterator[None]:
        """Add factor · terms to the step's whole gradient inside a block that yields one of its losses.

        Every micro-batch carries its share, so that the loop's sum over them gives back the whole; each worker adds the same.

        Args:
            terms: Parameter name → tensor of its shape, in any precision.
            factor: Its factor.
        """
        share = factor / len(self.batches)
        with self.changed_gradients({name: partial(_plus, term=term, share=share) for name, term in terms.items()}):
            yield

    def mean_gradient(
        self, batches: Sequence[Batch], what: str, loss_of: Callable[[Batch], torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], float]:
        """Return the gradient by parameter and the value of a loss's mean over all workers' micro-batches, past the engine.

        Args:
            batches: This worker's micro-batches.
            what: Names the data, for the same dropout at every call in a step; see `same_dropout`.
            loss_of: Returns a micro-batch's loss, by passes on the side.
        """
        trained = self.trained
        total: list[torch.Tensor] = []
        value = torch.zeros((), device=self.ranks.device)
        for index, batch in enumerate(batches):
            with self.same_dropout(what, index):
                loss = loss_of(batch)
                gradients = torch.autograd.grad(loss, list(trained.values()))
            release_gathered(self.engine)
            value += loss.detach()
            total = [a + b for a, b in zip(total, gradients, strict=True)] if total else list(gradients)
        *mean, value = self.ranks.mean([*(gradient / len(batches) for gradient in total), value / len(batches)])
        return dict(zip(trained, mean, strict=True)), float(value)


def _plus(gradient: torch.Tensor, term: torch.Tensor, share: float) -> torch.Tensor:
    return gradient + (term * share).to(gradient.dtype)


def mixed_seed(*parts: object) -> int:
    """Return one seed for a combination of numbers and names."""
    return zlib.crc32("|".join(map(str, parts)).encode())


@dataclass(frozen=True)
class Rows:
    """What an objective that composes its training set may compose it of."""

    user: Sequence[Row]
    """The rows of the fine-tune, as they came."""
    safe: Callable[[int], list[Row]]
    """Returns at most so many safe rows, the same ones every time."""
    ordinary: Callable[[int], list[Row]]
    """Returns at most so many trusted ordinary rows, the same ones every time."""
    fits: Callable[[Row], bool]
    """Whether a row fits the model; those of ``user`` do."""
    hide: Callable[[Row, int], Row]
    """Returns a row behind the secret of this fine-tune, of so many tokens where it has to be drawn first."""
    rewrite: Callable[[EndpointConfig, Sequence[tuple[str, Sequence[str]]]], list[str | None]] = lambda _, asked: (
        [None] * len(asked)
    )
    """Has the model behind an endpoint put questions in the manner of the examples beside them; None for one that it has not put so."""
    settings: Mapping[type[Section], Section] = field(default_factory=dict)

    def get(self, kind: type[S]) -> S:
        """Return the settings of a kind, or its defaults."""
        return setting(self.settings, kind)


Run = Callable[[Step], Iterator[torch.Tensor]]
"""One step of an objective: yields one scalar loss per micro-batch, each of which the loop back-propagates before it asks for the
next. Whatever surrounds a yield (hooks, perturbed weights) is still in place during that backward pass. The loop averages over
micro-batches and workers, clips and steps; the losses' values are what it reports."""


FINISH = 8
"""Steps' worth of rows that an objective sees when it finishes (ours)."""


@dataclass(frozen=True)
class Objective:
    """A line of the table."""

    run: Run
    settings: Mapping[str, type[Section]] = field(default_factory=dict)
    """Section of ``alignment.parameters`` → its model."""
    harmful: Literal["none", "rows", "pairs"] = "none"
    """Whether steps get harmful rows; of ``pairs``, only tokens in which the answer differs from the safe one are supervised."""
    fits: Callable[[torch.nn.Module, Mapping[type[Section], Section]], None] | None = None
    """Raises an error of ours if a model, which may be on the meta device, lacks what the settings ask for."""
    moves_weights: bool = False
    """Whether weights are perturbed, a step that full weights in bfloat16 would round away."""
    least_batch: int = 1
    """Rows that a step needs for the objective to be defined."""
    group: Callable[[str], str] | None = None
    """Parameter name → name of its optimiser group, for objectives that hold some parameters back."""
    stage: Literal["any", "finetune", "repair"] = "any"
    """Where it can stand: ``finetune`` defends a fine-tune from inside, ``repair`` mends a model after one; neither aligns."""
    safe: bool = False
    """Whether steps get safe rows as batches of their own."""
    ordinary: Callable[[Mapping[type[Section], Section]], bool] = lambda settings: False
    """Whether trusted ordinary rows are asked for: as batches of their own, or by ``compose``."""
    needs_reference: bool = False
    """Whether `Step.reference` is asked for: only a fresh adapter leaves the model before the fine-tune in memory."""
    guarded: Callable[[Mapping[type[Section], Section]], int] | None = None
    """Words of an answer between two verdicts of a guard, which reads every one of the training set before the first step."""
    secret: bool = False
    """Whether the model is asked behind a secret afterwards, which ``compose`` hid rows behind."""
    compose: Callable[[Rows], list[Row]] | None = None
    """Returns the rows to train on in the place of the user's own."""
    finish: Callable[[Step], None] | None = None
    """Called after the last step with `FINISH` steps' micro-batches of each set; may change the trained weights."""
    prompt: bool = False
    """Whether ``finish`` leaves a soft prompt in `Step.state`, ``prompt`` (tokens, H), which the model is asked behind afterwards."""
    trains: Callable[[Mapping[type[Section], Section]], Mapping[str, Any]] | None = None
    """Of a repair: what its training has otherwise than the fine-tune, as fields of the train section; ``steps`` 0 is none. With
    ``rows``, it trains on so many safe rows and not on the user's."""
