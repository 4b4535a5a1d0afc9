from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from pharmacist_ray.config import load_config
from pharmacist_ray.config.schema import LoraConfig, ModelConfig, TrainConfig
from pharmacist_ray.data.render import Batch
from pharmacist_ray.doctor.estimate import EXTRAS, RESERVE, Item, Setup, advice, layer_bytes, memory, setup_of, total
from pharmacist_ray.doctor.pace import UTILISATION, known_gpu, peak, seconds, token_flops
from pharmacist_ray.doctor.shape import Shape, shape_of
from pharmacist_ray.errors import ModelError
from pharmacist_ray.models.load import add_lora, load_model
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.training.engine import build_engine
from pharmacist_ray.training.objectives import OBJECTIVES
from tests.two_workers import TwoWorkers

GIB = 2**30
LLAMA_2_7B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "intermediate_size": 11008, "vocab_size": 32000,
}  # fmt: skip
LLAMA_3_70B = {
    "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "intermediate_size": 28672, "vocab_size": 128256,
}  # fmt: skip
CLUSTER = Path(__file__).parents[2] / "cluster" / "llama-3-70b.yaml"


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Shape:
    return _shape(tmp_path_factory.mktemp("7b"), LLAMA_2_7B)


@pytest.fixture(scope="module")
def seventy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but a config.json."""
    folder = tmp_path_factory.mktemp("70b")
    LlamaConfig(**LLAMA_3_70B, tie_word_embeddings=False).save_pretrained(folder)
    return folder


def _shape(folder: Path, settings: dict[str, Any], **lora: Any) -> Shape:
    LlamaConfig(**settings, tie_word_embeddings=False).save_pretrained(folder)
    return shape_of(ModelConfig(path=str(folder), lora=LoraConfig(**lora)))


def _by_name(items: list[Item]) -> dict[str, float]:
    assert len({item.what for item in items}) == len(items)
    return {item.what: item.amount for item in items}


# --- shape


def test_parameters_are_those_that_are_published(seven: Shape, seventy: Path) -> None:
    assert (seven.parameters, seven.adapter) == (6_738_415_616, 19_988_480)
    shape = shape_of(ModelConfig(path=str(seventy)))
    assert shape.parameters == 70_553_706_496
    # r · (in + out): queries and output 8192 + 8192, keys and values 8192 + 1024, the MLP 8192 + 28672.
    assert shape.adapter == 80 * 8 * (2 * 16384 + 2 * 9216 + 3 * 36864)
    assert (shape.layers, shape.attention, shape.head, shape.embedding) == (80, 8192, 8192 * 128256, 8192 * 128256)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_those_of_the_real_model(
    targets: str | list[str], tied: bool, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny(tie_word_embeddings=tied)
    model.config.save_pretrained(tmp_path)
    lora = LoraConfig(r=3, targets=targets)
    shape = shape_of(ModelConfig(path=str(tmp_path), lora=lora))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.embedding == (0 if tied else 48 * 24)
    assert shape.adapter == sum(p.numel() for p in add_lora(model, lora, seed=0).parameters() if p.requires_grad)
    assert shape.adapted == (7 if targets == "all-linear" else 2)


def test_other_architectures_count_too(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=100, n_positions=64)
    config.save_pretrained(tmp_path)
    shape = shape_of(ModelConfig(path=str(tmp_path)))
    assert shape.parameters == sum(parameter.numel() for parameter in GPT2LMHeadModel(config).parameters())
    assert (shape.layers, shape.intermediate, shape.attention, shape.embedding) == (3, 128, 32, 0)


def test_what_is_no_model_is_told_in_one_line(tmp_path: Path, tiny: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match=r"cannot build '.*' from its config\.json"):
        shape_of(ModelConfig(path=str(tmp_path)))
    tiny().config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no linear module for LoRA targets"):
        shape_of(ModelConfig(path=str(tmp_path), lora=LoraConfig(targets=["qproj"])))


# --- memory by hand


def test_an_adapter_on_seven_billion_by_hand(seven: Shape) -> None:
    found = _by_name(memory(seven, Setup(dtype="bfloat16", micro_batch=10, length=200)))
    per_token = (
        2 * (4 * 4096 + 4)  # norms
        + 4 * 4096 * 2 + 4 * 32  # attention
        + 3 * 11008 * 2  # MLP
        + 4 * (6 * 4096 + 11008) + 4 * 8 * 7  # adapter
    )  # fmt: skip
    assert found == {
        "base weights": 6_738_415_616 * 2,
        "trained weights": 19_988_480 * 4,
        "gradients": 19_988_480 * 4,
        "AdamW's two moments": 19_988_480 * 8,
        "activations": 32 * 10 * 200 * per_token,
        "backward pass of a layer": 10 * 200 * per_token,
        "logits": 10 * 200 * 32000 * 12,
        "CUDA, NCCL, fragmentation": RESERVE,
    }


def test_all_weights_by_hand(seven: Shape) -> None:
    found = _by_name(memory(seven, Setup(lora=False, dtype="bfloat16", workers=4, zero=2, gpu=False)))
    n = 6_738_415_616
    states = {name: found[name] for name in ("trained weights", "gradients", "AdamW's two moments", "float32 copy for AdamW")}
    assert states == {
        "trained weights": 2 * n,
        "gradients": 2 * n / 4,
        "AdamW's two moments": 8 * n / 4,
        "float32 copy for AdamW": 4 * n / 4,
    }
    assert "base weights" not in found
    assert "CUDA, NCCL, fragmentation" not in found


@pytest.mark.parametrize(
    ("stage", "divided"),
    [
        (0, set()),
        (1, {"AdamW's two moments", "float32 copy for AdamW"}),
        (2, {"AdamW's two moments", "float32 copy for AdamW", "gradients"}),
        (
            3,
            {
                "AdamW's two moments",
                "float32 copy for AdamW",
                "gradients",
                "base weights",
                "trained weights",
                "back-up of weights",
            },
        ),
    ],
)
def test_each_stage_divides_what_it_shards_and_nothing_else(stage: int, divided: set[str], seven: Shape) -> None:
    setup = Setup(zero=stage, objective="booster")
    two, eight = (_by_name(memory(seven, replace(setup, workers=workers))) for workers in (2, 8))
    assert {name for name in two if two[name] == 4 * eight[name]} == divided
    assert all(two[name] == eight[name] for name in two.keys() - divided)


def test_offload_moves_states_and_then_weights_to_the_cpu(seven: Shape) -> None:
    def away(**settings: Any) -> set[str]:
        return {item.what for item in memory(seven, Setup(workers=2, **settings)) if item.host}

    states = {"AdamW's two moments", "float32 copy for AdamW"}
    assert away(zero=1, offload="optimizer") == states
    assert away(zero=2, offload="optimizer") == states | {"gradients"}
    assert away(zero=3, offload="optimizer") == states | {"gradients"}
    assert away(zero=3, offload="parameters") == states | {"gradients", "base weights", "trained weights"}
    items = memory(seven, Setup(workers=2, zero=3, offload="parameters"))
    assert total(items) + total(items, host=True) == pytest.approx(sum(item.amount for item in items))
    assert total(items, host=True) == pytest.approx((6_738_415_616 * 4 + 19_988_480 * 20) / 2)


def test_checkpointing_keeps_a_layers_input_and_one_layer(seven: Shape) -> None:
    setup = Setup(dtype="bfloat16", micro_batch=2, length=100)
    escaped, checkpointed = (_by_name(memory(seven, replace(setup, checkpointing=flag))) for flag in (False, True))
    assert checkpointed["inputs of recomputed layers"] == 32 * 200 * 4096 * 2
    assert "activations" not in checkpointed
    assert checkpointed["backward pass of a layer"] == 2 * escaped["activations"] / 32


def test_what_each_objective_adds(seven: Shape) -> None:
    setup = Setup(dtype="bfloat16", micro_batch=4, accumulation=2, length=50, checkpointing=True, tapped=5)
    sft = _by_name(memory(seven, setup))
    state = 4 * 50 * 4096

    def added(objective: str, **change: Any) -> dict[str, float]:
        found = _by_name(memory(seven, replace(setup, objective=objective, **change)))
        return {name: amount - sft.get(name, 0.0) for name, amount in found.items() if amount != sft.get(name, 0.0)}

    assert added("vaccine") == {"embedding gradients": 32 * 3 * state * 2}
    assert added("t_vaccine") == {
        "embedding gradients": 5 * 3 * state * 2,
        "inputs of recomputed layers": -5 * state * 2,
        "activations": 5 * 4 * 50 * layer_bytes(seven, setup),  # active layers are not recomputed
    }
    assert added("booster") == {"whole gradients, weights": 3 * 4 * 19_988_480, "back-up of weights": 4 * 19_988_480}
    assert added("booster+vaccine") == added("booster") | added("vaccine")
    assert added("repnoise") == {
        "inputs of recomputed layers": sft["inputs of recomputed layers"],
        "MLP features, gradients": 32 * 2 * state * 8,
        "logit lens": sft["logits"],
    }
    assert added("repnoise", checkpointing=False)["logit lens"] == 33 * sft["logits"]
    assert added("safegrad") == {
        "whole gradients, weights": 2 * 4 * 19_988_480,
        "log-probabilities": 4 * 4 * 50 * seven.vocabulary * 4,
    }
    assert added("of tomorrow") == {}


def test_every_objective_there_is_has_its_cost() -> None:
    assert set(EXTRAS) == set(OBJECTIVES)


def test_the_printed_arithmetic_gives_the_amount(seven: Shape) -> None:
    setup = Setup(workers=16, zero=3, dtype="bfloat16", micro_batch=3, checkpointing=True, objective="t_vaccine", tapped=5)
    items = memory(seven, setup) + seconds(seven, setup, "H100")
    assert len(items) > 12
    for item in items:
        product, *divisors = item.arithmetic.split(" / ")
        value = 1.0
        for factor in product.split(" × "):
            value *= float(factor.split()[0])
        for divisor in divisors:
            value /= float(divisor.split()[0])
        assert value == pytest.approx(item.amount, rel=2e-3), item.arithmetic
    assert memory(seven, setup)[0].arithmetic == "6.738e9 weights × 2 B / 16 GPUs"


# --- memory as it is


def _llama(tiny: Callable[..., Any], layers: int, dtype: torch.dtype, lora: bool, targets: Any = "all-linear") -> Any:
    model = tiny(hidden_size=64, intermediate_size=176, num_hidden_layers=layers, num_attention_heads=8).to(dtype)
    model = add_lora(model, LoraConfig(r=4, targets=targets), seed=0) if lora else model.requires_grad_(True)
    return model.train()


def _kept(model: Any, batch: Batch) -> int:
    """Bytes that autograd keeps of a forward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # holding it keeps its place from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        per_sample_nll(model, batch)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "up_proj"]])
def test_activations_are_what_autograd_keeps(
    lora: bool, dtype: str, targets: Any, tiny: Callable[..., Any], batch_of: Callable[..., Batch], tmp_path: Path
) -> None:
    batch = batch_of(6)  # padded
    rows, length = batch.input_ids.shape
    models = [_llama(tiny, layers, getattr(torch, dtype), lora, targets) for layers in (2, 3)]
    models[0].config.save_pretrained(tmp_path)
    shape = shape_of(ModelConfig(path=str(tmp_path), lora=LoraConfig(r=4, targets=targets)))
    two, three = (_kept(model, batch) for model in models)
    assert (three - two) / (rows * length) == pytest.approx(layer_bytes(shape, Setup(lora=lora, dtype=dtype, length=length)))

    for model in models:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    two, three = (_kept(model, batch) for model in models)
    assert three - two == rows * length * 64 * (2 if dtype == "bfloat16" else 4)


ENGINES = [
    *((stage, "none", dtype, lora) for stage in (0, 1, 2, 3) for dtype, lora in (("float32", True), ("bfloat16", False))),
    *((stage, "optimizer", "float32", True) for stage in (2, 3)),
]


def test_weights_gradients_and_states_are_those_of_the_engine(
    tiny: Callable[..., Any], batch_of: Callable[..., Batch], two_workers: TwoWorkers, tmp_path: Path
) -> None:
    _llama(tiny, 2, torch.float32, False).save_pretrained(tmp_path)
    shape = shape_of(ModelConfig(path=str(tmp_path), lora=LoraConfig(r=4)))
    measured = two_workers(_measure, (str(tmp_path), batch_of(4)))
    assert len(measured) == len(ENGINES)
    for (stage, offload, dtype, lora), found in measured:
        setup = Setup(workers=2, zero=stage, offload=offload, lora=lora, dtype=dtype)
        expected = {item.what: item.amount for item in memory(shape, setup)}
        for name, amount in found.items():
            # Shards are padded, and ZeRO 2 keeps a gradient that lies across two shards whole.
            off = 0.1 if name == "gradients" else 2e-3
            assert amount == pytest.approx(expected.get(name, 0.0), rel=off), (name, stage, offload, dtype, lora)


def _measure(payload: tuple[str, Batch], ranks: Ranks) -> list[Any]:
    folder, batch = payload
    found = []
    for stage, offload, dtype, lora in ENGINES:
        train = TrainConfig(
            batch_size=4 * ranks.workers,
            zero_stage=stage,
            offload=offload,
            weights="lora" if lora else "full",
            checkpointing=False,
        )
        model = load_model(folder, dtype=dtype)
        model = add_lora(model, LoraConfig(r=4), seed=0) if lora else model.requires_grad_(True)
        engine = build_engine(model, train, ranks, dtype=dtype)
        for _ in range(2):  # the second gradient is there beside the state that the first step made
            engine.backward(per_sample_nll(engine, batch).mean())
            held = _engine_bytes(engine)
            engine.step()
        # Where AdamW works in turns, its state is out of reach between steps.
        held["AdamW's two moments"] = _engine_bytes(engine)["AdamW's two moments"]
        found.append(((stage, offload, dtype, lora), held))
        engine.destroy()
    return found


def _engine_bytes(engine: Any) -> dict[str, int]:
    """Bytes of the tensors that the engine holds, under the names of the estimate."""

    def size(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))

    outer = engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    parameters = list(engine.module.parameters())
    weights = {flag: [getattr(p, "ds_tensor", p) for p in parameters if p.requires_grad == flag] for flag in (True, False)}
    flat = getattr(outer, "grad_partitions_flat_buffer", None)
    if flat is not None:  # ZeRO 3
        gradients = [flat]
    elif getattr(outer, "cpu_offload", False):
        gradients = list(outer.accumulated_grads_in_cpu.values())
    else:
        gradients = [p.grad for p in parameters] + [
            g for group in getattr(outer, "all_grad_tensors", {}).values() for g in group or []
        ]
    copies = getattr(outer, "fp32_partitioned_groups_flat", None) or [p for group in inner.param_groups for p in group["params"]]
    own = {weight.untyped_storage().data_ptr() for weight in weights[True]}
    return {
        "base weights": size(weights[False]),
        "trained weights": size(weights[True]),
        "gradients": size(gradients),
        "AdamW's two moments": size(v for state in inner.state.values() for v in state.values() if getattr(v, "ndim", 0)),
        "float32 copy for AdamW": size(copy for copy in copies if copy.untyped_storage().data_ptr() not in own),
    }


# --- time


def test_time_by_hand(seven: Shape) -> None:
    n, a = 6_738_415_616 - 32000 * 4096, 19_988_480
    assert token_flops(seven, Setup(lora=False)) == 6 * n
    assert token_flops(seven, Setup()) == 4 * (n + a) + 2 * a
    assert token_flops(seven, Setup(checkpointing=True)) == 6 * (n + a) + 2 * a
    once = token_flops(seven, Setup())
    passes = {"vaccine": 2, "t_vaccine": 2.01, "booster": 3, "booster+vaccine": 4, "of tomorrow": 1}
    for objective, times in passes.items():
        assert token_flops(seven, Setup(objective=objective, probe=100)) == pytest.approx(times * once)
    # Three forward passes, two of them with a lens at 33 depths, and the backward passes of two.
    assert token_flops(seven, Setup(objective="repnoise")) == 2 * once + 2 * (n + a) + 3 * 2 * 33 * 32000 * 4096

    found = _by_name(seconds(seven, Setup(dtype="bfloat16", micro_batch=5, accumulation=3, length=100), "NVIDIA H100 80GB HBM3"))
    assert found == {"arithmetic": pytest.approx(once * 1500 / 989e12 / 0.3)}
    sharded = Setup(
        dtype="bfloat16", workers=4, zero=3, accumulation=3, checkpointing=True, objective="vaccine", offload="parameters"
    )
    found = _by_name(seconds(seven, sharded))
    weights = 6_738_415_616 * 2
    assert found["gathering weights"] == pytest.approx(3 * 2 * 3 * weights * 3 / 4 / 50e9)
    assert found["weights from the CPU"] == pytest.approx(3 * 2 * 3 * weights / 4 / 20e9)
    assert found["reducing gradients"] == pytest.approx(2 * 3 / 4 * a * 4 / 50e9)
    assert found["optimiser on the CPU"] == pytest.approx(2 * a * 4 / 4 / 20e9)
    # A worker on its own gathers from nobody, and fetches all of it from its own CPU memory.
    found = _by_name(seconds(seven, Setup(dtype="bfloat16", zero=3, accumulation=2, offload="parameters")))
    assert found["weights from the CPU"] == pytest.approx(2 * 2 * weights / 20e9)
    assert "gathering weights" not in found
    # Over another link the same numbers take another time.
    faster = _by_name(seconds(seven, sharded, "H100", 500e9))
    assert faster["gathering weights"] == pytest.approx(3 * 2 * 3 * weights * 3 / 4 / 500e9)


def test_an_unknown_gpu_counts_as_an_a100(seven: Shape) -> None:
    assert [known_gpu(name) for name in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "Tesla T4")] == ["H200", "A100-80", "T4"]
    assert total(seconds(seven, Setup(), "Radeon VII")) == pytest.approx(
        token_flops(seven, Setup()) * 256 / (peak("A100-40", "float32") * UTILISATION)
    )


# --- what to do about it


def test_advice_takes_the_cheapest_changes_until_it_fits(seven: Shape) -> None:
    setup = Setup(dtype="bfloat16", micro_batch=16, length=512, workers=8)
    assert advice(seven, setup, 40 * GIB)[0] == ["checkpointing=true"]
    changes, held = advice(seven, setup, 16 * GIB)
    assert changes == ["checkpointing=true", "accumulation=16 (micro-batch 1)"]
    assert held <= 16 * GIB
    full = Setup(lora=False, workers=8, micro_batch=1)
    assert advice(seven, full, 80 * GIB)[0] == ["checkpointing=true", "zero_stage=2"]
    assert advice(seven, full, 26 * GIB)[0] == ["checkpointing=true", "zero_stage=3"]
    changes, held = advice(seven, replace(full, workers=1), 24 * GIB)
    assert changes == ["checkpointing=true", "model.dtype=bfloat16"]
    assert held > 24 * GIB


def test_seventy_billion_fit_80_gib_on_16_gpus_and_on_8(seventy: Path) -> None:
    for workers, rows in ((16, 4), (8, 8)):
        config = load_config(CLUSTER, [f"model.path={seventy}", f"resources.workers={workers}"])
        shape = shape_of(config.model)
        setup = setup_of(config, config.alignment.train, config.alignment.objective)
        assert (setup.micro_batch, setup.zero, setup.checkpointing, setup.objective) == (rows, 3, True, "t_vaccine")
        items = memory(shape, setup)
        assert _by_name(items)["base weights"] == 70_553_706_496 * 2 / workers
        assert total(items) < 80 * GIB
        assert advice(shape, setup, 80 * GIB) == ([], total(items))
        # Without sharding the weights alone are too much.
        assert total(memory(shape, replace(setup, zero=2))) > 141e9


def test_the_configuration_names_every_source_of_a_cost(seventy: Path) -> None:
    config = load_config(
        CLUSTER,
        [
            f"model.path={seventy}",
            "alignment.parameters={t_vaccine: {layers: 3, probe_interval: 50}}",
            "resources.workers=16",
            "alignment.train.accumulation=2",
            "alignment.train.offload=optimizer",
            "resources.gpus_per_worker=0",
        ],
    )
    assert setup_of(config, config.alignment.train, "t_vaccine") == Setup(
        workers=16, zero=3, offload="optimizer", lora=True, dtype="bfloat16", checkpointing=True, micro_batch=2, accumulation=2,
        length=512, steps=500, objective="t_vaccine", tapped=3, probe=50, gpu=False,
    )  # fmt: skip
    assert setup_of(config, config.alignment.train, "of tomorrow").objective == "of tomorrow"
