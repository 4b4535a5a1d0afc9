"""What one GPU does with models of real size: tokens per second, share of its peak, and memory against the doctor's estimate.

The models are Llamas of known shapes with random weights, so nothing is downloaded. The program drives `models` and a plain PyTorch
loop: it needs neither Ray nor DeepSpeed, and fits into the first minutes on a machine with a GPU.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
import transformers
from rich.table import Table

from pharmacist_ray.config.model import LoraConfig, ModelConfig
from pharmacist_ray.data.render import IGNORE, Batch
from pharmacist_ray.doctor.estimate import Item, Setup, memory, total
from pharmacist_ray.doctor.gpus import recognised
from pharmacist_ray.doctor.pace import peak, token_flops
from pharmacist_ray.doctor.passes import influence_memory, weights_memory
from pharmacist_ray.doctor.shape import Shape, shape_of
from pharmacist_ray.errors import ResourceError, unknown_name
from pharmacist_ray.models.influence import Directions, influence
from pharmacist_ray.models.load import DTYPES, add_lora
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.models.modes import enable_checkpointing
from pharmacist_ray.pipeline.console import console, say
from pharmacist_ray.storage import write_text

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}  # fmt: skip
"""Name → what its LlamaConfig has; 1B and 8B are the shapes of Llama 3.2 1B and Llama 3.1 8B (their config.json)."""

WORKS = ("hooks", "ghost", "lora", "lora, recomputed")
"""What is timed: scoring along one direction by two methods, and an optimiser step of an adapter, also with checkpointing."""


@dataclass(frozen=True)
class Trial:
    """What is measured, and how long it may take."""

    shapes: Sequence[str] = ("1B", "8B")
    """Keys of `SHAPES`."""
    device: str = "cuda"
    dtype: str = "bfloat16"
    length: int = 512
    """Tokens of a row; all but the first count as answer, which is the most that the head ever has to do."""
    rows: int = 16
    """Rows of a pass at most; fewer where the estimate says that they would not fit."""
    rounds: int = 5
    """Timed passes; one more before them warms up."""
    rank: int = 16
    budget_s: float = 450.0
    """Seconds after which nothing more is begun."""


@dataclass(frozen=True)
class Measured:
    """One kind of work on one model."""

    shape: str
    work: str
    rows: int
    length: int
    seconds: float | None = None
    """Median of a pass; None where there was no room or no time, see ``why``."""
    tokens_per_second: float | None = None
    mfu: float | None = None
    """Model FLOP/s over the GPU's peak by its data sheet; the recomputation of checkpointing counts for nothing. None where the peak is
    not known."""
    peak_gib: float | None = None
    """The most that PyTorch had allocated; None on a CPU."""
    estimate_gib: float = 0.0
    """The doctor's estimate, without what CUDA itself takes."""
    why: str = ""
    items: dict[str, float] = field(default_factory=dict)
    """The estimate's lines in GiB."""


def measure(trial: Trial) -> list[Measured]:
    """Measure every kind of work on every shape.

    Raises:
        ConfigError: A shape is unknown.
        ResourceError: There is no such device here.
    """
    for name in trial.shapes:
        if name not in SHAPES:
            raise unknown_name("shape", name, list(SHAPES))
    if trial.device == "cuda" and not torch.cuda.is_available():
        raise ResourceError("no GPU that PyTorch can use is here; --tiny --device cpu runs the same program small")
    torch.set_float32_matmul_precision("high")  # of the adapter, which is float32
    end = time.monotonic() + trial.budget_s
    found: list[Measured] = []
    for name in trial.shapes:
        began = time.monotonic()
        shape, config = _shape(name, trial)
        model = _model(config, trial)
        say(f"  {name}: {shape.parameters:,} parameters in {trial.dtype}, made in {time.monotonic() - began:.0f} s")
        for work in WORKS:
            found.append(_one(name, work, model, shape, trial, end))
            say(f"  {name}, {work}: {_in_words(found[-1])}")
        del model
        _emptied(trial)
    return found


def show(found: Sequence[Measured], trial: Trial, out: Path | None = None) -> None:
    """Print what was measured, and write it to ``gpu.json`` in a folder."""
    machine = machine_of(trial)
    table = Table(title=f"{machine['gpu'] or 'CPU'}, {trial.dtype}, rows of {trial.length} tokens", title_justify="left")
    for heading in ("model", "work", "rows", "s a pass", "tokens/s", "MFU", "peak GiB", "estimate GiB", "peak/estimate"):
        table.add_column(heading, justify="left" if heading in ("model", "work") else "right")
    for one in found:
        measured = (one.seconds, one.tokens_per_second, one.mfu, one.peak_gib, one.estimate_gib, _ratio(one))
        forms = ("{:.3f}", "{:,.0f}", "{:.0%}", "{:.2f}", "{:.2f}", "{:.2f}")
        cells = ["–" if value is None else form.format(value) for value, form in zip(measured, forms, strict=True)]
        table.add_row(one.shape, one.work, str(one.rows), one.why or cells[0], *cells[1:])
    console.print(table)
    if out is not None:
        result = {"machine": machine, "trial": asdict(trial), "gpu": [asdict(one) for one in found]}
        write_text(json.dumps(result, indent=1), out / "gpu.json")
        say(f"  written to {out / 'gpu.json'}")


def machine_of(trial: Trial) -> dict[str, Any]:
    """Return what ran it: cores, memory, GPU, versions."""
    gpu = torch.cuda.get_device_properties(0) if trial.device == "cuda" else None
    return {
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": gpu and gpu.name,
        "gpu_gib": gpu and round(gpu.total_memory / 2**30, 1),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")} | {"cuda": torch.version.cuda},
    }


def estimated(shape: Shape, setup: Setup, work: str) -> list[Item]:
    """Return what a kind of work should hold, item by item.

    An adapter's step is what the doctor says of a training, and scoring along one direction what it says of that.

    Args:
        shape: The model.
        setup: Rows, length, precision, checkpointing.
        work: One of `WORKS`.
    """
    if work.startswith("lora"):
        return memory(shape, setup)
    direction = Item("direction", ((shape.adapter, "weights"), (4, "B")))
    return [*weights_memory(shape, setup), direction, *influence_memory(shape, setup, work)]


def _one(name: str, work: str, model: Any, shape: Shape, trial: Trial, end: float) -> Measured:
    """Measure one kind of work with as many rows as the estimate lets fit."""
    setup = Setup(
        dtype=trial.dtype, checkpointing=work.endswith("recomputed"), micro_batch=trial.rows, length=trial.length, gpu=False
    )
    while setup.micro_batch > 1 and total(estimated(shape, setup, work)) > _room(trial):
        setup = replace(setup, micro_batch=setup.micro_batch // 2)
    items = estimated(shape, setup, work)
    blank = Measured(
        name, work, setup.micro_batch, trial.length,
        estimate_gib=total(items) / 2**30, items={item.what: item.amount / 2**30 for item in items},
    )  # fmt: skip
    if time.monotonic() > end:
        return replace(blank, why="no time left")
    try:
        seconds, most = _timed(work, model, setup, trial)
    except torch.cuda.OutOfMemoryError:
        return replace(blank, why="out of memory")
    finally:
        _emptied(trial)
    tokens = setup.micro_batch * trial.length
    speed = tokens / seconds
    known = recognised(torch.cuda.get_device_name()) if trial.device == "cuda" else None
    useful = token_flops(shape, replace(setup, checkpointing=False))
    mfu = useful * speed / peak(known, trial.dtype) if known else None
    return replace(blank, seconds=seconds, tokens_per_second=speed, mfu=mfu, peak_gib=None if most is None else most / 2**30)


def _timed(work: str, model: Any, setup: Setup, trial: Trial) -> tuple[float, int | None]:
    """Return the median seconds of a pass, and the peak of allocated bytes."""
    batch = _batch(model, setup, trial)
    run = _scoring(model, batch, work) if work in ("hooks", "ghost") else _training(model, batch, setup.checkpointing)
    if trial.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    for number in range(trial.rounds + 1):
        started = time.perf_counter()
        run()
        if trial.device == "cuda":
            torch.cuda.synchronize()
        if number:
            times.append(time.perf_counter() - started)
    return statistics.median(times), torch.cuda.max_memory_allocated() if trial.device == "cuda" else None


def _scoring(model: Any, batch: Batch, method: str) -> Callable[[], object]:
    """Return a pass that scores a batch along one direction through the adapter."""
    generator = torch.Generator(batch.labels.device).manual_seed(1)
    directions: Directions = {
        name: torch.randn(1, *weight.shape, generator=generator, device=weight.device)
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    model.eval()
    return lambda: influence(model, batch, directions, method=method)


def _training(model: Any, batch: Batch, recompute: bool) -> Callable[[], object]:
    """Return an optimiser step on the adapter: plain PyTorch, as one worker without DeepSpeed would take it."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model.train()
    if recompute:
        enable_checkpointing(model)
    else:
        model.gradient_checkpointing_disable()

    def step() -> None:
        torch.autograd.backward(per_sample_nll(model, batch).mean())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _shape(name: str, trial: Trial) -> tuple[Shape, transformers.LlamaConfig]:
    """Return what the doctor takes for the model's shape, and its configuration."""
    config = transformers.LlamaConfig(**SHAPES[name], max_position_embeddings=max(2048, trial.length))
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return shape_of(ModelConfig(path=folder, lora=LoraConfig(r=trial.rank))), config


def _model(config: transformers.LlamaConfig, trial: Trial) -> Any:
    """Return a Llama with random weights and an adapter, made where it runs."""
    torch.manual_seed(0)
    with torch.device(trial.device):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[trial.dtype])
    return add_lora(base, LoraConfig(r=trial.rank), seed=0).to(trial.device)


def _batch(model: Any, setup: Setup, trial: Trial) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (setup.micro_batch, setup.length), generator=generator)
    labels = ids.clone()
    labels[:, 0] = IGNORE
    return Batch(ids, torch.ones_like(ids), labels).to(trial.device)


def _room(trial: Trial) -> float:
    """Return the bytes that may be planned with: nine tenths of the GPU, for what CUDA and fragmentation take."""
    return 0.9 * torch.cuda.get_device_properties(0).total_memory if trial.device == "cuda" else float("inf")


def _emptied(trial: Trial) -> None:
    gc.collect()
    if trial.device == "cuda":
        torch.cuda.empty_cache()


def _ratio(one: Measured) -> float | None:
    return None if one.peak_gib is None else one.peak_gib / one.estimate_gib


def _in_words(one: Measured) -> str:
    return one.why or f"{one.tokens_per_second:,.0f} tokens/s" + ("" if one.mfu is None else f", {one.mfu:.0%} of the peak")
