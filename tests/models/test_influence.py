from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pharmacist_ray.data.render import Batch
from pharmacist_ray.errors import ConfigError, ModelError
from pharmacist_ray.models.folded import folded
from pharmacist_ray.models.influence import METHODS, influence, loop_influence
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.models.sample_grads import last_layers
from pharmacist_ray.models.taps import decoder_layers

EXACT = ("hooks", "ghost")


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def lora(model: nn.Module, **settings: Any) -> Any:
    """An adapter on all linear layers whose B is not zero, so that A has a gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
        )
        for name, param in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(param, std=0.1)
    return adapted.eval()


def directions_for(model: nn.Module, k: int = 2, seed: int = 0, only: str = "") -> dict[str, torch.Tensor]:
    """K unit-norm random directions over all trainable parameters."""
    generator = torch.Generator().manual_seed(seed)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad and only in name}
    steps = {name: torch.randn(k, *p.shape, generator=generator) for name, p in trainable.items()}
    length = torch.stack([step.flatten(1).square().sum(1) for step in steps.values()]).sum(0).sqrt()
    return {name: step / length.view(-1, *[1] * (step.dim() - 1)) for name, step in steps.items()}


@pytest.fixture(params=["lora", "full", "full-tied"])
def model(request: pytest.FixtureRequest, tiny: Any) -> Any:
    if request.param == "lora":
        return lora(tiny())
    return tiny(tie_word_embeddings=request.param == "full-tied", attention_bias=True)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_every_method_equals_one_backward_per_sample(model: Any, batch_of: Any, size: int, padded: bool) -> None:
    batch, directions = batch_of(size, padded=padded), directions_for(model)
    want = loop_influence(model, batch, directions)
    assert want.dots.shape == (size, 2)
    assert float(want.dots.abs().min()) > 0
    for method in METHODS:
        got = influence(model, batch, directions, method=method)
        assert relative(got.dots, want.dots) < (1e-2 if method == "difference" else 1e-4), method
        torch.testing.assert_close(got.losses, want.losses, rtol=1e-3 if method == "difference" else 1e-5, atol=0)


def test_the_loop_equals_forward_mode_differentiation(model: Any, batch_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # After ZeRO 3 DeepSpeed leaves one of its own there, which has no forward mode.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    (model.get_base_model() if hasattr(model, "peft_config") else model).set_attn_implementation("eager")
    batch, directions = batch_of(4), directions_for(model, k=1)
    params = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: directions[name][0] if name in directions else torch.zeros_like(p) for name, p in params.items()}

    @dataclass
    class Functional:
        params: dict[str, torch.Tensor]

        def __call__(self, **inputs: Any) -> Any:
            return torch.func.functional_call(model, self.params, (), inputs)

        def get_output_embeddings(self) -> Any:
            return model.get_output_embeddings()

    _, want = torch.func.jvp(lambda p: per_sample_nll(Functional(p), batch), (params,), (tangents,))
    assert relative(loop_influence(model, batch, directions).dots[:, 0], want) < 1e-4
    assert relative(influence(model, batch, directions).dots[:, 0], want) < 1e-4


@pytest.mark.parametrize("chunk", [1, 2**26])
def test_norms_equal_those_of_the_loop(model: Any, batch_of: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pharmacist_ray.models.influence.CHUNK", chunk)
    batch, directions = batch_of(5), directions_for(model)
    want = loop_influence(model, batch, directions)
    got = influence(model, batch, directions, norms=True)
    assert relative(got.grad_norms, want.grad_norms) < 1e-5  # with tied weights only if both uses are added before the square
    assert relative(got.dots, want.dots) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_no_sample_sees_its_batch(model: Any, batch_of: Any, method: str) -> None:
    batch, directions = batch_of(8), directions_for(model)
    whole = influence(model, batch, directions, method=method).dots
    order = torch.tensor([5, 2, 7])
    part = Batch(batch.input_ids[order], batch.attention_mask[order], batch.labels[order])
    alone = influence(model, part, directions, method=method).dots
    assert relative(alone, whole[order]) < (1e-2 if method == "difference" else 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_k_directions_equal_k_passes(model: Any, batch_of: Any, method: str) -> None:
    batch, directions = batch_of(3), directions_for(model, k=3)
    together = influence(model, batch, directions, method=method).dots
    for k in range(3):
        alone = influence(model, batch, {name: step[k : k + 1] for name, step in directions.items()}, method=method).dots
        torch.testing.assert_close(alone[:, 0], together[:, k], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_zero_direction_gives_zero(model: Any, batch_of: Any, method: str) -> None:
    zeros = {name: torch.zeros_like(step) for name, step in directions_for(model).items()}
    assert influence(model, batch_of(2), zeros, method=method).dots.abs().max() == 0


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("training", [True, False])
def test_gradient_checkpointing_changes_nothing(model: Any, batch_of: Any, method: str, training: bool) -> None:
    batch, directions = batch_of(3), directions_for(model)
    want = influence(model, batch, directions, norms=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    handle = model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("gate_proj"))).register_forward_hook(
        lambda *_: calls.append(1)
    )
    model.train(training)
    got = influence(model, batch, directions, method=method, norms=method == "hooks")
    handle.remove()
    assert len(calls) == 2, "the layer was not recomputed: checkpointing was off"
    assert relative(got.dots, want.dots) < 1e-6
    if method == "hooks":
        assert relative(got.grad_norms, want.grad_norms) < 1e-6


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_of_the_last_layers_alone_nothing_below_is_in_the_graph(
    model: Any, batch_of: Any, method: str, checkpointing: bool
) -> None:
    batch, every = batch_of(3), directions_for(model)
    directions = {name: every[name] for name in last_layers(model, 1, every)}
    assert directions
    assert not any("layers.0." in name for name in directions)
    want = loop_influence(model, batch, directions)
    first, last = decoder_layers(model)[0], decoder_layers(model)[-1]
    places = {"first": first.mlp, "below": last.input_layernorm, "last": last.mlp}
    seen: dict[str, list[bool]] = {name: [] for name in places}

    def look(name: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            seen[name].append((output if isinstance(output, torch.Tensor) else output[0]).requires_grad)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in places.items()]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    got = influence(model, batch, directions, method=method, norms=method == "hooks")
    for handle in handles:
        handle.remove()
    if checkpointing:  # transformers then has the embedding's output require a gradient; below nothing is computed again
        assert (len(seen["first"]), len(seen["below"])) == (1, 2)
    else:
        assert seen == {"first": [False], "below": [False], "last": [True]}
    assert relative(got.dots, want.dots) < 1e-5
    if method == "hooks":
        assert relative(got.grad_norms, want.grad_norms) < 1e-5
    assert last_layers(model, 99, every) == {*every}


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(model: Any, batch_of: Any, method: str) -> None:
    model.train()
    next(m for m in model.modules() if isinstance(m, nn.Linear)).eval()  # a mixture of modes must survive
    frozen = next(p for p in model.parameters() if p.requires_grad)
    directions = directions_for(model)
    frozen.requires_grad_(False)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]

    def check() -> None:
        assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert all(p.grad is None for p in model.parameters())
        assert [m.training for m in model.modules()] == modes
        assert [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()] == hooks

    influence(model, batch_of(3), directions, method=method)
    check()
    broken = batch_of(3)
    broken.input_ids[0, 0] = 10_000  # no such token: the forward fails
    with pytest.raises(IndexError):
        influence(model, broken, directions, method=method)
    check()
    loop_influence(model, batch_of(2), directions)
    check()


@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_off_even_in_training_mode(tiny: Any, batch_of: Any, method: str) -> None:
    model = lora(tiny(attention_dropout=0.5), lora_dropout=0.5)
    batch, directions = batch_of(3), directions_for(model)
    want = loop_influence(model, batch, directions).dots
    model.train()
    assert relative(influence(model, batch, directions, method=method).dots, want) < 1e-2


@pytest.mark.parametrize("method", EXACT)
def test_float32_adapters_on_a_bfloat16_base(tiny: Any, batch_of: Any, method: str) -> None:
    model = lora(tiny().to(torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    batch, directions = batch_of(8), directions_for(model)
    got = influence(model, batch, directions, method=method)
    assert got.dots.dtype == torch.float32
    assert relative(got.dots, loop_influence(model, batch, directions).dots) < 3e-2  # the noise of a bfloat16 forward


@pytest.mark.parametrize("method", EXACT)
def test_a_bfloat16_model(tiny: Any, batch_of: Any, method: str) -> None:
    model = tiny().to(torch.bfloat16)
    batch, directions = batch_of(8), directions_for(model)
    assert relative(influence(model, batch, directions, method=method).dots, loop_influence(model, batch, directions).dots) < 3e-2
    with pytest.raises(ModelError, match=r"is torch.bfloat16, too coarse .* use 'hooks'"):
        influence(model, batch, directions, method="difference")


@pytest.mark.parametrize("method", EXACT)
def test_norms_with_an_offset_and_layer_norms(tiny: Any, batch_of: Any, method: str) -> None:
    class OffsetNorm(nn.Module):  # Gemma's
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1.5, 1.0, width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.rms_norm(x, x.shape[-1:]) * (1 + self.weight)

    model = tiny()
    model.model.layers[0].input_layernorm = OffsetNorm(24)
    model.model.norm = nn.LayerNorm(24)
    nn.init.normal_(model.model.norm.bias)
    batch, directions = batch_of(3), directions_for(model, only="norm")
    assert relative(influence(model, batch, directions, method=method).dots, loop_influence(model, batch, directions).dots) < 1e-4


@pytest.mark.parametrize("method", EXACT)
def test_a_padding_token_inside_a_prompt(model: Any, batch_of: Any, method: str) -> None:
    batch, directions = batch_of(3), directions_for(model)
    batch.input_ids[:, 0] = 0  # attended to, but autograd gives the embedding's padding row no gradient
    assert relative(influence(model, batch, directions, method=method).dots, loop_influence(model, batch, directions).dots) < 1e-4


def test_a_tied_weight_goes_by_either_name(tiny: Any, batch_of: Any) -> None:
    model = tiny(tie_word_embeddings=True)
    batch, v = batch_of(3), torch.randn(1, 48, 24, generator=torch.Generator().manual_seed(0))
    by_embedding = influence(model, batch, {"model.embed_tokens.weight": v}).dots
    assert torch.equal(influence(model, batch, {"lm_head.weight": v}).dots, by_embedding)
    with pytest.raises(ModelError, match="same tied weight"):
        influence(model, batch, {"lm_head.weight": v, "model.embed_tokens.weight": v})


def test_what_cannot_be_covered_is_named(tiny: Any, batch_of: Any) -> None:
    class Twice(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = tiny()
    model.lm_head = Twice(24, 48, bias=False)
    batch, v = batch_of(2), {"lm_head.weight": torch.randn(1, 48, 24, generator=torch.Generator().manual_seed(0))}
    text = r"no per-sample gradient for lm_head.weight \(a parameter of Twice\); use method 'difference'"
    for method in EXACT:
        with pytest.raises(ModelError, match=text):
            influence(model, batch, v, method=method)
    want = loop_influence(model, batch, v).dots
    assert relative(influence(model, batch, v, method="difference").dots, want) < 1e-2


def test_a_parameter_outside_the_forward_pass_is_named(tiny: Any, batch_of: Any) -> None:
    model = tiny()
    model.spare = nn.Linear(2, 2, bias=False)
    with pytest.raises(ModelError, match=r"spare.weight takes no part in the forward pass"):
        influence(model, batch_of(2), {"spare.weight": torch.ones(1, 2, 2)})


@pytest.mark.parametrize(
    ("directions", "text"),
    [
        ({}, "the same number K"),
        ({"lm_head.weight": torch.ones(1, 48, 24), "model.norm.weight": torch.ones(2, 24)}, r"the same number K .* \[1, 2\]"),
        ({"no.such": torch.ones(1, 3)}, "'no.such' names no parameter of this model"),
        ({"lm_head.weight": torch.ones(1, 24, 48)}, r"'lm_head.weight' has shape \(24, 48\), the parameter \(48, 24\)"),
    ],
)
def test_wrong_directions_are_refused(tiny: Any, batch_of: Any, directions: dict[str, torch.Tensor], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        influence(tiny(), batch_of(2), directions)


def test_wrong_methods_are_refused(tiny: Any, batch_of: Any) -> None:
    model = tiny()
    with pytest.raises(
        ConfigError, match=r"unknown influence method 'hook' \(did you mean 'hooks'\?\); known: difference, ghost"
    ):
        influence(model, batch_of(2), directions_for(model), method="hook")
    with pytest.raises(ConfigError, match="'ghost' forms no per-sample gradient"):
        influence(model, batch_of(2), directions_for(model), method="ghost", norms=True)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_folded_adapter_has_the_same_influences(tiny: Any, batch_of: Any, method: str, checkpointing: bool) -> None:
    model = lora(tiny(), use_rslora=True)
    batch, directions = batch_of(5), directions_for(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    want = loop_influence(model, batch, directions)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda *_: calls.append(1))
    with folded(model):
        got = influence(model, batch, directions, method=method, norms=method == "hooks")
        loss = per_sample_nll(model, batch)
    assert not calls, "a layer was not folded"
    assert relative(got.dots, want.dots) < 1e-5
    torch.testing.assert_close(loss, want.losses, rtol=1e-5, atol=0)
    if got.grad_norms is not None:
        assert relative(got.grad_norms, want.grad_norms) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    per_sample_nll(model, batch)
    assert calls, "a layer stayed folded"
