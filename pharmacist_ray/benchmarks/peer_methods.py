"""How rows are scored along a direction: our ways, and other systems' written plainly from descriptions, on one model and its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from pharmacist_ray.config.schema import LoraConfig
from pharmacist_ray.data.render import IGNORE, Batch
from pharmacist_ray.models.folded import folded
from pharmacist_ray.models.influence import influence
from pharmacist_ray.models.load import add_lora
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.models.sample_grads import Part, last_layers, tapped_losses

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64},
    "1M": {"vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384},
    "20M": {"vocab_size": 8192, "hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "intermediate_size": 1024},
    "135M": {
        "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
}  # fmt: skip
"""Llamas with random weights; the last has the shape of SmolLM2-135M."""
PROJECTED = 8192
"""Numbers that LESS keeps of a gradient (arXiv 2402.04333)."""
AT_ONCE = 256 << 20
"""Numbers of gradients that wait to be projected together, at most (1 GiB): the signs, which are drawn anew each time, cost least so."""
BLOCK = 4096
"""Numbers of a gradient that are projected at once: 128 MiB of signs."""
SIDE = 16
"""Rows and columns that a hook collector keeps of each matrix's gradient (bergson's default); a side that is no longer stays as it is."""
EPOCHS = 3
"""Of SEAL's bilevel selection (released code)."""
TRUSTED = 8
"""Further rows, whose mean gradient is the direction: a random one would have nothing in common with any row's."""
LAST = 3
"""One layer of so many counts for ``last layers``."""
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Load:
    """What is measured."""

    shape: str = "20M"
    weights: str = "lora"
    """``lora`` or ``full``: whose gradients are meant."""
    rows: int = 64
    length: int = 128
    """Tokens of the longest rows; half of a row is answer."""
    tokens_per_batch: int = 2048
    rounds: int = 3
    device: str = "cpu"
    rank: int = 16


@dataclass(frozen=True)
class Method:
    """A line of the table."""

    run: Callable[[Bench], Scores]
    about: str
    bytes_per_row: Callable[[Bench], int] = lambda bench: 8
    """What it writes for a row; a score is 8 bytes."""


@dataclass
class Bench:
    """A model, rows, and a direction to score them along."""

    model: Any
    rows: list[tuple[list[int], int]]
    """Token ids and where the answer begins."""
    direction: dict[str, torch.Tensor]
    """Parameter name → (1, *shape)."""
    tokens_per_batch: int
    device: str
    folder: Path
    kept: dict[str, Any] = field(default_factory=dict)
    """What a method makes once, such as a projection."""

    def batch(self, places: Sequence[int]) -> Batch:
        """Return some rows as a right-padded batch."""
        width = max(len(self.rows[place][0]) for place in places)
        ids, mask, labels = (torch.full((len(places), width), fill) for fill in (0, 0, IGNORE))
        for index, (row, start) in enumerate(self.rows[place] for place in places):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
            labels[index, start : len(row)] = ids[index, start : len(row)]
        return Batch(ids, mask, labels).to(self.device)

    def batches(self) -> Iterator[tuple[list[int], Batch]]:
        """Yield places and rows in batches of about equal lengths, the longest first."""
        order, batch = sorted(range(len(self.rows)), key=lambda place: -len(self.rows[place][0])), list[int]()
        for place in order:
            if batch and (len(batch) + 1) * len(self.rows[batch[0]][0]) > self.tokens_per_batch:
                yield batch, self.batch(batch)
                batch = []
            batch.append(place)
        yield batch, self.batch(batch)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Those that the direction is of."""
        known = dict(self.model.named_parameters())
        return {name: known[name] for name in self.direction}

    def gradient(self, place: int) -> torch.Tensor:
        """Return one row's gradient, flat, by a backward pass of its own."""
        parameters = list(self.parameters.values())
        loss = per_sample_nll(self.model, self.batch([place])).sum()
        return torch.cat([one.flatten().float() for one in torch.autograd.grad(loss, parameters)])

    @property
    def flat(self) -> torch.Tensor:
        """The direction in one piece."""
        return torch.cat([one[0].flatten() for one in self.direction.values()])


def _forward(bench: Bench) -> Scores:
    found = np.zeros(len(bench.rows))
    with torch.no_grad():
        for places, batch in bench.batches():
            found[places] = per_sample_nll(bench.model, batch).double().cpu().numpy()
    return found


def _folded(bench: Bench) -> Scores:
    with folded(bench.model):
        return _forward(bench)


def _by(method: str, share: int = 1) -> Callable[[Bench], Scores]:
    """Return our scoring by a method of `influence`, of one in ``share`` layers from the last."""

    def run(bench: Bench) -> Scores:
        directions = bench.direction
        if share > 1:
            names = last_layers(bench.model, max(1, bench.model.config.num_hidden_layers // share), directions)
            directions = {name: one for name, one in directions.items() if name in names}
        found = np.zeros(len(bench.rows))
        with folded(bench.model):
            for places, batch in bench.batches():
                found[places] = influence(bench.model, batch, directions, method=method).dots[:, 0].double().cpu().numpy()
        return found

    return run


def _loop(bench: Bench) -> Scores:
    flat = bench.flat
    return np.array([float(bench.gradient(place) @ flat) for place in range(len(bench.rows))])


def _sketch(bench: Bench, vector: torch.Tensor) -> torch.Tensor:
    """Return `PROJECTED` numbers of a vector by a count sketch: a pass over it, where LESS's own projection takes thousands."""
    if "sketch" not in bench.kept:
        generator = torch.Generator().manual_seed(0)
        place = torch.randint(0, PROJECTED, (len(vector),), generator=generator)
        sign = torch.randint(0, 2, (len(vector),), generator=generator).float() * 2 - 1
        bench.kept["sketch"] = place.to(vector.device), sign.to(vector.device)
    place, sign = bench.kept["sketch"]
    return torch.zeros(PROJECTED, device=vector.device).index_add_(0, place, vector * sign)


def _projected(vectors: torch.Tensor) -> torch.Tensor:
    """Return the products of vectors (n, P) with `PROJECTED` vectors of random signs: (n, PROJECTED).

    The matrix is too large to be kept; as in the paper's code, which borrows TRAK's projectors, it is drawn again from its seed.
    """
    found = torch.zeros(len(vectors), PROJECTED, device=vectors.device)
    for first in range(0, vectors.shape[1], BLOCK):
        some = vectors[:, first : first + BLOCK]
        bits = np.random.Generator(np.random.PCG64(first)).bytes(some.shape[1] * PROJECTED // 8)
        drawn = torch.from_numpy(np.unpackbits(np.frombuffer(bits, np.uint8))).to(vectors.device)
        found += some @ drawn.view(-1, PROJECTED).to(some.dtype).mul_(2).sub_(1)
    return found.div_(PROJECTED**0.5)


def _less(bench: Bench) -> Scores:
    if "target" not in bench.kept:
        bench.kept["target"] = _projected(bench.flat[None])[0].double().cpu().numpy()
    file, at_once = bench.folder / "less.bin", max(1, AT_ONCE // len(bench.flat))
    with file.open("wb") as store:
        for first in range(0, len(bench.rows), at_once):
            some = range(first, min(first + at_once, len(bench.rows)))
            store.write(_projected(torch.stack([bench.gradient(place) for place in some])).half().cpu().numpy().tobytes())
    return np.asarray(_kept(bench, file) @ bench.kept["target"])


def _sketched(bench: Bench) -> Scores:
    file = bench.folder / "sketched.bin"
    with file.open("wb") as store:
        for place in range(len(bench.rows)):
            store.write(_sketch(bench, bench.gradient(place)).half().cpu().numpy().tobytes())
    return np.asarray(_kept(bench, file) @ _sketch(bench, bench.flat).double().cpu().numpy())


def _kept(bench: Bench, file: Path) -> Scores:
    return np.fromfile(file, np.float16).reshape(len(bench.rows), PROJECTED).astype(np.float64)


def _dataflex(bench: Bench) -> Scores:
    target = _sketch(bench, bench.flat)
    return np.array([float(_sketch(bench, bench.gradient(place)) @ target) for place in range(len(bench.rows))])


def _bergson(bench: Bench) -> Scores:
    def sides(name: str, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        if name not in bench.kept:
            generator = torch.Generator().manual_seed(len(bench.kept))
            made = (
                torch.randn(size, SIDE, generator=generator) / SIDE**0.5 if size > SIDE else torch.eye(size)
                for size in (rows, columns)
            )
            bench.kept[name] = tuple(one.to(bench.device) for one in made)
        left, right = bench.kept[name]
        return left, right

    matrices = {name: one for name, one in bench.direction.items() if one.dim() == 3}
    target = []
    for name, one in matrices.items():
        left, right = sides(name, *one.shape[1:])
        target.append((left.T @ one[0] @ right).flatten())
    file, places_of = bench.folder / "collected.bin", list[int]()
    with file.open("wb") as store, _frozen(bench.model):
        for places, batch in bench.batches():
            found: dict[str, torch.Tensor] = {}

            def use(name: str, parts: list[Part], found: dict[str, torch.Tensor] = found) -> None:
                left, right = sides(name, *matrices[name].shape[1:])
                for part in parts:
                    if isinstance(part.module, torch.nn.Embedding):
                        made = torch.einsum("boi,op,iq->bpq", part.gradient(slice(None)), left, right)
                    else:
                        made = torch.einsum("btp,btq->bpq", part.output_grad.float() @ left, part.input.float() @ right)
                    found[name] = found[name] + made if name in found else made

            tapped_losses(bench.model, batch, list(matrices), use)
            rows = torch.cat([found[name].flatten(1) for name in matrices], dim=1)
            store.write(rows.half().cpu().numpy().tobytes())
            places_of += places
    kept = np.fromfile(file, np.float16).reshape(len(bench.rows), -1).astype(np.float64)
    scores = np.zeros(len(bench.rows))
    scores[places_of] = kept @ torch.cat(target).double().cpu().numpy()
    return scores


def _collected(bench: Bench) -> int:
    shapes = [one.shape[1:] for one in bench.direction.values() if one.dim() == 3]
    return sum(2 * min(SIDE, rows) * min(SIDE, columns) for rows, columns in shapes)


def _default(bench: Bench) -> Scores:
    """Return the first-order influence, and compute beside it what else the default scorers and the baselines by loss take."""
    found, losses = np.zeros(len(bench.rows)), np.zeros((2, len(bench.rows)))
    two = {name: torch.cat([one, one]) for name, one in bench.direction.items()}  # with the simulated attack, and without
    with folded(bench.model):
        for places, batch in bench.batches():
            found[places] = influence(bench.model, batch, two, norms=True).dots[:, 0].double().cpu().numpy()
    with bench.model.disable_adapter() if hasattr(bench.model, "disable_adapter") else nullcontext():
        losses[0] = _forward(bench)
    losses[1] = _folded(bench)  # the reference: another adapter in the same slot
    return found


def _seal(bench: Bench) -> Scores:
    """Learn a logit a row over epochs: rows whose loss stays above that of a model trained on trusted rows alone are given up."""
    logits = torch.zeros(len(bench.rows), device=bench.device)
    before = {name: one.detach().clone() for name, one in bench.parameters.items()}
    parameters = list(bench.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    try:
        for _ in range(EPOCHS):
            for places, batch in bench.batches():
                losses = per_sample_nll(bench.model, batch)
                weights = torch.softmax(logits[places], dim=0)
                trusted = per_sample_nll(bench.model, batch).mean()  # as many trusted rows: the same cost
                optimizer.zero_grad()
                for parameter, gradient in zip(
                    parameters, torch.autograd.grad((weights * losses).sum() + trusted, parameters), strict=True
                ):
                    parameter.grad = gradient
                optimizer.step()
                logits[places] -= 5e-3 * weights * (losses.detach() - (weights * losses.detach()).sum())
    finally:
        with torch.no_grad():
            for name, one in bench.parameters.items():
                one.copy_(before[name])
    return np.asarray(logits.double().cpu().numpy())


METHODS: dict[str, Method] = {
    "forward": Method(_forward, "the loss of every row, and nothing else: the floor"),
    "forward, folded": Method(_folded, "the same with the adapter folded into the weights, as ours has it"),
    "hooks": Method(_by("hooks"), "ours: per-sample gradients of one matrix at a time, by hooks"),
    "ghost": Method(_by("ghost"), "ours: products without per-sample gradients"),
    "last layers": Method(_by("hooks", LAST), f"ours by hooks, the last layers alone, one in {LAST}"),
    "default scorers": Method(
        _default, "ours: influences by hooks with norms, and the losses of base and reference", lambda bench: 32
    ),
    "loop": Method(_loop, "a backward pass a row, by hand"),
    "LESS": Method(_less, "a backward pass a row, projected by random signs and stored", lambda bench: 2 * PROJECTED),
    "LESS, sketched": Method(_sketched, "the same with the cheapest projection that there is", lambda bench: 2 * PROJECTED),
    "DataFlex": Method(_dataflex, "a backward pass a row within the training loop: sketched, not stored"),
    "bergson": Method(_bergson, "hook collectors: both sides of every matrix projected and stored", _collected),
    "SEAL": Method(_seal, f"a logit a row, learnt in {EPOCHS} epochs beside as many trusted rows"),
}
"""Ours, and others' by what their descriptions say; none of their code is here."""


def make(load: Load, folder: Path) -> Bench:
    """Return a model with an adapter that is not at its start, rows as long as texts are, and a direction."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES[load.shape], max_position_embeddings=4096)).to(load.device).eval()
    if load.weights == "lora":
        model = add_lora(model, LoraConfig(r=load.rank), seed=0).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    draw = np.random.default_rng(0)
    # Lengths of texts are about log-normal; the longest are cut, as a model's max_length does.
    lengths = np.clip(np.exp(draw.normal(np.log(0.5 * load.length), 0.6, load.rows + TRUSTED)), 8, load.length).astype(int)
    rows = [(draw.integers(3, SHAPES[load.shape]["vocab_size"], length).tolist(), int(length) // 2) for length in lengths]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    bench = Bench(model, rows, {name: one[None] for name, one in trained.items()}, load.tokens_per_batch, load.device, folder)
    mean = torch.stack([bench.gradient(place) for place in range(load.rows, len(rows))]).mean(dim=0)
    sizes = [parameter.numel() for parameter in trained.values()]
    parts = torch.split(mean, sizes)
    bench.direction = {name: part.view(1, *trained[name].shape).clone() for name, part in zip(trained, parts, strict=True)}
    bench.rows = rows[: load.rows]
    return bench


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Take requires_grad off all parameters inside a block."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
