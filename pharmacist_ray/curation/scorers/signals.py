"""What scorers are computed from: losses and influences of one shard's rows, each computed at most once and only if asked for.

An actor makes one `Probe` (the model, loaded once) and one `Signals` per shard. A scorer reads the signals it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file

from pharmacist_ray.config.scoring import GuardConfig, PlantedConfig
from pharmacist_ray.curation.last_layers import weighed
from pharmacist_ray.curation.poison import RowAtFaultError
from pharmacist_ray.curation.scorers.trusted import TrustedSets
from pharmacist_ray.curation.selector import AT_CHECKPOINTS, TINY
from pharmacist_ray.data.render import IGNORE, Batch, Rendered
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.models.budget import TokenBudget, TooLongError
from pharmacist_ray.models.folded import folded
from pharmacist_ray.models.influence import influence
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.models.modes import enable_checkpointing
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.storage import local_copy, read_table

Made = TypeVar("Made")
StatesKey = tuple[int | None, bool]
"""A layer, None for all, and whether the state is the prompt's."""

REFERENCES = ("reference", "tov")
"""Models tuned on trusted sets, by the folder of the selector in which they lie."""


@dataclass(frozen=True)
class ProbeSpec:
    """Which model and selector to load, and how to pass rows through it."""

    model: ModelRef
    fit: str
    """The selector's folder; empty where no scorer needs one."""
    checkpoints: tuple[str, ...]
    """Those whose directions are needed."""
    directions: tuple[str, ...]
    method: str
    tokens_per_batch: int
    cosine: bool
    device: str = "cpu"
    checkpointing: bool = False
    last_layers: int | None = None
    """Decoder layers, from the last, over whose adapters influences are taken; None: all."""
    groups: int = 0
    """Directions of groups of trusted rows, which follow the named ones."""
    teacher: ModelRef | None = None
    """The model whose states tell harmful prompts; None: the base."""


class Probe:
    """A base model with one adapter slot, into which checkpoints and the reference are swapped."""

    def __init__(self, spec: ProbeSpec, group: Ranks | None = None) -> None:
        """Load the model and every small file of the selector but the logits.

        Args:
            spec: What to load.
            group: This worker's place in the group that holds the model together; None: it is held whole here.

        Raises:
            ArtifactError: A file of the selector is missing.
        """
        spec = replace(spec, device=str(group.device)) if group else spec  # of several GPUs in sight, this worker's
        self.spec, self.group = spec, group
        self.states_asked: set[StatesKey] = set()
        self._learnt: dict[str, dict[str, float]] = {}
        self.fit = local_copy(spec.fit) if spec.fit else Path()
        self.directions = [self._directions(name) for name in spec.checkpoints]
        folders = {name: self.fit / "warmup" / name for name in spec.checkpoints}
        references = {name: self.fit / name / "adapter" for name in REFERENCES} if spec.fit else {}
        folders |= {name: folder for name, folder in references.items() if folder.exists()}
        self.adapters = {name: self._read(folder / "adapter_model.safetensors", spec.device) for name, folder in folders.items()}
        self.renderer = spec.model.renderer()
        self.budget = TokenBudget(spec.tokens_per_batch, (group.rank, group.workers) if group else None)
        adapter = next(iter(folders.values()), None)
        if group:
            from pharmacist_ray.training.sharded import load_sharded  # slow to import: DeepSpeed

            self.model = load_sharded(spec.model, group, adapter=adapter)
        else:
            self.model = spec.model.load(spec.device, adapter=adapter)
        if spec.checkpointing:
            enable_checkpointing(self.model)

    @cached_property
    def teacher(self) -> Probe:
        """The model whose states tell harmful prompts, loaded when it is first asked."""
        if self.spec.teacher is None:
            return self
        alone = replace(self.spec, model=self.spec.teacher, fit="", checkpoints=(), directions=(), groups=0, teacher=None)
        return Probe(alone, self.group)

    def of_all(self, values: np.ndarray) -> np.ndarray:
        """Return an array to which each worker of the group has brought some rows, zeros for the others: with all of them."""
        if self.group is None:
            return values
        return np.asarray(self.group.total(torch.from_numpy(values).to(self.group.device)).cpu().numpy())

    def set_adapter(self, adapter: str) -> Any:
        """Return the model with one of `adapters` in its slot."""
        if adapter not in self.adapters:
            raise ArtifactError(
                f"the selector in {self.spec.fit} has no adapter '{adapter}'; run `pharmacist fit` for this scorer"
            )
        from peft import set_peft_model_state_dict  # there since the model was loaded

        set_peft_model_state_dict(self.model, self.adapters[adapter])
        return self.model

    @contextmanager
    def base(self) -> Iterator[Any]:
        """Give the model as it was before any adapter."""
        with self.model.disable_adapter() if self.adapters else nullcontext():
            yield self.model

    def learnt(self, part: str) -> dict[str, float]:
        """Return the logit of each candidate that a part of the selector has learnt; read once."""
        if part not in self._learnt:
            file = self.fit / f"{part}.parquet"
            if not file.exists():
                raise ArtifactError(f"the selector is incomplete: {file} is missing; run `pharmacist fit` for this scorer")
            table = read_table(file)
            self._learnt[part] = dict(zip(table.column("id").to_pylist(), table.column("logit").to_pylist(), strict=True))
        return self._learnt[part]

    def _directions(self, checkpoint: str) -> dict[str, torch.Tensor]:
        """Return a checkpoint's named directions and those of the groups, one after the other."""
        wanted = {"directions": self.spec.directions, "groups": self.spec.groups}
        first, *others = (self._of_part(part, checkpoint) for part in AT_CHECKPOINTS if wanted[part])
        return (
            {name: torch.cat([tensor, *(other[name] for other in others)]) for name, tensor in first.items()} if others else first
        )

    def _of_part(self, part: str, checkpoint: str) -> dict[str, torch.Tensor]:
        """Return a checkpoint's directions of one kind, over the layers that are asked for."""
        directions = self._read(self.fit / part / f"{checkpoint}.safetensors", self.spec.device)
        if self.spec.last_layers is None:
            return directions
        weights = self.fit / "last_layers" / f"{part}.safetensors"
        return weighed(weights, self.spec.checkpoints.index(checkpoint), self.spec.last_layers, directions)

    @staticmethod
    def _read(file: Path, device: str) -> dict[str, torch.Tensor]:
        if not file.exists():
            raise ArtifactError(f"the selector is incomplete: {file} is missing; run `pharmacist fit` again")
        return dict(load_file(file, device=device))


class Signals:
    """Per-row quantities of one shard; every array is (N,) float64 in the order of the rows."""

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        probe: Probe | None = None,
        trusted: TrustedSets | None = None,
        planted: PlantedConfig | None = None,
        guard: GuardConfig | None = None,
    ) -> None:
        """Nothing is computed yet.

        Args:
            rows: The shard's rows.
            probe: The actor's model; None where no scorer needs one.
            trusted: The trusted rows as text.
            planted: Where the planted labels are, for the oracle.
            guard: Which classifier the guard scorer asks; None where it trains its own.
        """
        self.rows = rows
        self.planted = planted
        self.guard = guard
        self._probe = probe
        self._trusted = trusted
        self._states: dict[StatesKey, np.ndarray] = {}

    @property
    def probe(self) -> Probe:
        """The actor's model."""
        assert self._probe is not None, "a scorer whose line in the table does not say so has asked for the model"
        return self._probe

    @property
    def trusted(self) -> TrustedSets:
        """The trusted rows as text."""
        assert self._trusted is not None
        return self._trusted

    @cached_property
    def samples(self) -> list[Rendered]:
        """The rows as token ids."""
        return self.probe.renderer.render_all(self.rows)

    @property
    def ids(self) -> list[str]:
        """The rows' ids."""
        return [row.id for row in self.rows]

    @property
    def tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return sum(len(sample.ids) for sample in self.samples)

    @cached_property
    def base_loss(self) -> np.ndarray:
        """ℓ_i of the base model."""
        with self.probe.base() as model:
            return self.losses(model, self.samples)

    @cached_property
    def unprompted_loss(self) -> np.ndarray:
        """ℓ_i of the base model when it sees the answer without the prompt (after one EOS token, so that there is a context)."""
        eos = self.probe.renderer.eos_id
        alone = [Rendered([eos, *sample.ids[sample.answer_start :]], 1) for sample in self.samples]
        with self.probe.base() as model:
            return self.losses(model, alone)

    def reference_loss(self, reference: str) -> np.ndarray:
        """Return ℓ_i of one of `REFERENCES`, the base tuned on trusted sets."""
        return self.losses(self.probe.set_adapter(reference), self.samples)

    def learnt(self, part: str) -> np.ndarray:
        """Return the logits that a part of the selector has learnt: ``logits`` (the iterative selector's) or ``seal``.

        Raises:
            ArtifactError: There are none, or a row has none.
        """
        known = self.probe.learnt(part)
        if strange := next((row.id for row in self.rows if row.id not in known), None):
            raise ArtifactError(
                f"{self.probe.spec.fit}/{part}.parquet has no logit for row {strange}: it was fitted on other candidates; fit again"
            )
        return np.array([known[row.id] for row in self.rows])

    def influence(self, direction: str) -> np.ndarray:
        """Return Σ_k ⟨∇ℓ_i(θ_k), v_k⟩ over the checkpoints, for a named direction."""
        return np.asarray(self._influences[0][:, self.probe.spec.directions.index(direction)])

    @property
    def group_influences(self) -> np.ndarray:
        """The same for each group of trusted rows, (N, groups)."""
        return self._influences[0][:, len(self.probe.spec.directions) :]

    @property
    def gradient_norm(self) -> np.ndarray:
        """‖∇ℓ_i‖ over the adapter, mean over the checkpoints."""
        return self._influences[1]

    @cached_property
    def _influences(self) -> tuple[np.ndarray, np.ndarray]:
        spec = self.probe.spec
        dots = np.zeros((len(self.rows), len(spec.directions) + spec.groups))
        norms = np.zeros(len(self.rows))
        exact = spec.method == "hooks"
        for name, directions in zip(spec.checkpoints, self.probe.directions, strict=True):
            model = self.probe.set_adapter(name)

            def add(rows: list[int], batch: Batch, model: Any = model, directions: Any = directions) -> None:
                found = influence(model, batch, directions, method=spec.method, norms=exact)
                values = found.dots.double().cpu().numpy()
                length = found.grad_norms.double().cpu().numpy() if found.grad_norms is not None else np.full(len(values), np.nan)
                if spec.cosine:
                    values = values / np.maximum(length, TINY)[:, None]
                dots[rows] += values[: len(rows)]
                norms[rows] += length[: len(rows)] / len(spec.checkpoints)

            with folded(model) if spec.method != "difference" else nullcontext():  # which moves the factors themselves
                self._in_batches(self.samples, add)
        return self.probe.of_all(dots), self.probe.of_all(norms)

    def states(self, layer: int | None = None, *, of_prompt: bool = False) -> np.ndarray:
        """Return the base's hidden states, averaged over each answer's tokens: (N, D) of one layer, or (N, L + 1, D) of all; float32.

        Layer 0 holds the embeddings, the last one what the output head reads.

        Args:
            layer: The layer; None: all.
            of_prompt: Return the state at the last token before the answer in the place of the mean.
        """
        key = (layer, of_prompt)
        if key not in self._states:
            # What was asked of an earlier shard will be asked of this one: all of it comes out of one pass.
            wanted = {key} if layer is None else {key} | self.probe.states_asked
            self._states |= self._passed(sorted(wanted - self._states.keys(), key=str))
            if layer is not None:
                self.probe.states_asked.add(key)
        return self._states[key]

    def _passed(self, keys: Sequence[StatesKey]) -> dict[StatesKey, np.ndarray]:
        """Return what `states` is asked for by layer and place, of one pass over the rows."""
        found: dict[StatesKey, np.ndarray] = {}
        with torch.no_grad(), self.probe.base() as model:
            whole = model.get_base_model() if self.probe.adapters else model
            # Without the output head, which takes a good part of a small model's pass; one that is spread has to be called as a whole.
            body = whole.base_model if self.probe.group is None else partial(whole, logits_to_keep=1)

            def take(rows: list[int], batch: Batch) -> None:
                output = body(input_ids=batch.input_ids, output_hidden_states=True)  # padded on the right: see `losses`
                answer = batch.labels != IGNORE
                last = torch.nn.functional.one_hot((answer.int().argmax(dim=1) - 1).clamp(min=0), answer.shape[1])
                for layer, of_prompt in keys:
                    weights = (last if of_prompt else answer).unsqueeze(-1)
                    layers = output.hidden_states if layer is None else output.hidden_states[layer : layer + 1 or None]
                    means = [(states.float() * weights).sum(dim=1) / weights.sum(dim=1) for states in layers]
                    values = torch.stack(means, dim=1).cpu().numpy() if layer is None else means[0].cpu().numpy()
                    if (layer, of_prompt) not in found:
                        found[layer, of_prompt] = np.zeros((len(self.rows), *values.shape[1:]), values.dtype)
                    found[layer, of_prompt][rows] = values[: len(rows)]

            self._in_batches(self.samples, take)
        return {key: self.probe.of_all(values) for key, values in found.items()}

    def prompt_states(self, layer: int | None = None) -> np.ndarray:
        """Return the base's hidden states at each prompt's last token, of one layer or of all; see `states`."""
        return self.states(layer, of_prompt=True)

    def by_teacher(self) -> Signals:
        """Return the same rows as the model sees them whose states tell harmful prompts."""
        if (teacher := self.probe.teacher) is self.probe:
            return self
        return Signals(self.rows, probe=teacher, trusted=self._trusted, planted=self.planted, guard=self.guard)

    def of_trusted(self, make: Callable[[Signals, Signals], Made], sets: tuple[str, str] = ("safe", "harmful")) -> Made:
        """Return what a function makes of the signals of two sets of trusted rows, made at an actor's first call.

        Args:
            make: Takes both.
            sets: Their names; ``safe`` are the sets that harmful rows are told from, the validation rows unless `TrustedSets.safe` says
                otherwise.
        """

        def signals(name: str) -> Signals:
            rows = self.trusted.safe_rows if name == "safe" else self.trusted.rows(name)
            return Signals(rows, probe=self._probe, trusted=self._trusted)

        made: Made = self.trusted.once(make, lambda: make(*map(signals, sets)))
        return made

    def losses(self, model: Any, samples: Sequence[Rendered] | None = None) -> np.ndarray:
        """Return a model's losses of the rows as they are, or as they are given here, (N,)."""
        samples = self.samples if samples is None else samples
        losses = np.zeros(len(samples))

        def take(rows: list[int], batch: Batch) -> None:
            losses[rows] = per_sample_nll(model, batch).double().cpu().numpy()[: len(rows)]

        with torch.no_grad(), folded(model):
            self._in_batches(samples, take)
        return self.probe.of_all(losses)

    def _in_batches(self, samples: Sequence[Rendered], use: Callable[[list[int], Batch], None]) -> None:
        """Call ``use`` with places of rows and their batch, until each row has been in one; see `in_batches`.

        A batch may have rows that have no place: what is found of them is not to be kept.
        """
        collate, device = self.probe.renderer.collate, self.probe.spec.device
        lengths = [len(sample.ids) for sample in samples]
        spare = [int(np.argmin(lengths))] if lengths else []  # for a worker whose turn it is, and who has no row left
        self.in_batches(lengths, lambda rows: use(rows, collate([samples[row] for row in rows or spare]).to(device)))

    def in_batches(self, lengths: Sequence[int], use: Callable[[list[int]], None]) -> None:
        """Call ``use`` with the places of rows, in batches that fit in memory, until each row has been in one.

        Args:
            lengths: Tokens of each row.
            use: Takes places of rows.

        Raises:
            RowAtFaultError: A row does not fit even alone.
        """
        try:
            self.probe.budget.run(lengths, use)
        except TooLongError as error:
            raise RowAtFaultError(self.rows[error.place].id, "out_of_memory", str(error)) from None
