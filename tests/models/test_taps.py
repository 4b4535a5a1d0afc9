from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
)

from pharmacist_ray.data.render import Batch
from pharmacist_ray.errors import ModelError
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.models.taps import captured, decoder_layers, gradients_at, modules_at, shifted

PLACES = ["layer", "attention", "mlp", "norm"]


def _attention_outputs(model: Any, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and the attention outputs, whose gradients autograd will keep."""
    kept: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        output[0].requires_grad_(True)
        output[0].retain_grad()
        kept.append(output[0])

    handles = [layer.self_attn.register_forward_hook(keep) for layer in model.model.layers]
    loss = per_sample_nll(model, batch).mean()
    for handle in handles:
        handle.remove()
    return loss, kept


def _recomputing(model: Any) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_that_autograd_keeps(checkpointing: bool, tiny: Any, batch_of: Any) -> None:
    model, batch = tiny(num_hidden_layers=3), batch_of(4)
    loss, kept = _attention_outputs(model, batch)
    loss.backward()
    model.zero_grad()
    if checkpointing:
        _recomputing(model)
    found = gradients_at(modules_at(model, "attention"), lambda: per_sample_nll(model, batch).mean())
    assert len(found) == 3
    for ours, theirs in zip(found, kept, strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-5, atol=1e-8)
        assert float(ours.abs().max()) > 1e-3
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("place", PLACES)
def test_gradients_are_those_of_finite_differences(place: Any, batch_of: Any) -> None:
    torch.manual_seed(0)
    model = (
        AutoModelForCausalLM.from_config(FAMILIES["gpt2"][0]).double().eval()
    )  # Llama's norms are in float32 whatever comes in
    batch = batch_of(3)
    modules = modules_at(model, place)

    def loss() -> torch.Tensor:  # in float64 all through
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())

    gradients = gradients_at(modules, loss)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        direction = [torch.randn(g.shape, generator=generator, dtype=torch.float64) for g in gradients]
        ends = []
        for size in (1e-5, -1e-5):
            with torch.no_grad(), shifted(modules, [size * d for d in direction]):
                ends.append(float(loss()))
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_shift_is_added_once_also_where_the_layer_is_computed_again(checkpointing: bool, tiny: Any, batch_of: Any) -> None:
    """The shift must be in the recomputation too, or the gradient would be that of another point."""
    batch = batch_of(4)

    def run(model: Any, hooked: Callable[[Any], Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with hooked(model):
            loss = per_sample_nll(model, batch).mean()
            loss.backward()
        return loss.detach(), [p.grad for p in model.parameters()]

    shape = (*batch.input_ids.shape, 24)
    shifts = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    for place in ("attention", "mlp", "layer"):
        model = _recomputing(tiny()) if checkpointing else tiny()
        got = run(model, lambda model, place=place: shifted(modules_at(model, place), shifts))

        # By hand: a bias on the way out of each module, in a model that recomputes nothing.
        plain = tiny()
        for index, layer in enumerate(plain.model.layers):
            part = {"attention": layer.self_attn.o_proj, "mlp": layer.mlp.down_proj, "layer": layer}[place]
            inner = part.forward
            part.forward = lambda *a, inner=inner, shift=shifts[index], **k: inner(*a, **k) + shift
        loss = per_sample_nll(plain, batch).mean()
        loss.backward()
        torch.testing.assert_close(got[0], loss.detach(), rtol=1e-6, atol=0)
        for ours, theirs in zip(got[1], plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-7)
        assert abs(got[0] - per_sample_nll(tiny(), batch).mean().detach()) > 1e-2


def test_a_shift_of_another_precision_takes_the_outputs(tiny: Any, batch_of: Any) -> None:
    model, batch = tiny().to(torch.bfloat16), batch_of(2)
    shifts = [torch.randn(*batch.input_ids.shape, 24)] * 2
    with shifted(modules_at(model, "attention"), shifts), captured(modules_at(model, "attention")) as outputs:
        per_sample_nll(model, batch)
    assert {output.dtype for output in outputs} == {torch.bfloat16}


def test_tuples_and_tensors_are_both_shifted_in_every_row() -> None:
    class Tuple(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
            return x, "weights"

    x, shift = torch.randn(3, 2, 4), torch.ones(3, 2, 4)
    for module in (Tuple(), nn.Identity()):
        with shifted([module], [shift]), captured([module]) as outputs:
            found = module(x)
        if isinstance(module, Tuple):
            assert found[1] == "weights"
            found = found[0]
        assert torch.equal(found, x + 1)
        assert torch.equal(outputs[0], x + 1)
        (gradient,) = gradients_at([module], lambda module=module: (torch.as_tensor(2.0) * _first(module(x))).sum())
        assert torch.equal(gradient, torch.full_like(x, 2.0))


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def test_what_is_captured_carries_its_graph(tiny: Any, batch_of: Any) -> None:
    model, batch = tiny(), batch_of(2)
    own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    with captured(modules_at(model, "layer")) as layers, captured(modules_at(model, "norm")) as norms:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    torch.testing.assert_close(layers[0], own.hidden_states[1])
    torch.testing.assert_close(norms[0], own.hidden_states[-1])
    weight = model.model.layers[0].mlp.down_proj.weight
    assert torch.autograd.grad(layers[1].sum(), weight)[0].abs().max() > 0


@pytest.mark.parametrize("kind", ["captured", "shifted", "gradients"])
def test_no_hook_is_left_also_after_an_exception(kind: str, tiny: Any, batch_of: Any) -> None:
    model, batch = tiny(), batch_of(2)
    modules = modules_at(model, "attention")

    def explode() -> torch.Tensor:
        per_sample_nll(model, batch)
        assert all(module._forward_hooks for module in modules)
        raise KeyError("planned")

    def use() -> None:
        if kind == "gradients":
            gradients_at(modules, explode)
        with captured(modules) if kind == "captured" else shifted(modules, [torch.zeros(())] * 2):
            explode()

    with pytest.raises(KeyError, match="planned"):
        use()
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_can_be_taken_where_gradients_are_off(tiny: Any, batch_of: Any) -> None:
    model, batch = tiny().requires_grad_(False), batch_of(2)
    with torch.no_grad():
        found = gradients_at(modules_at(model, "layer"), lambda: per_sample_nll(model, batch).mean())
    assert all(float(g.abs().max()) > 0 for g in found)


SMALL: dict[str, Any] = {"vocab_size": 48, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = {**SMALL, "intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 6}
FAMILIES: dict[str, tuple[Any, dict[str, str]]] = {
    "llama": (None, {"attention": "LlamaAttention", "mlp": "LlamaMLP", "norm": "LlamaRMSNorm"}),
    "mistral": (MistralConfig(**GATED), {"attention": "MistralAttention", "mlp": "MistralMLP", "norm": "MistralRMSNorm"}),
    "qwen2": (Qwen2Config(**GATED), {"attention": "Qwen2Attention", "mlp": "Qwen2MLP", "norm": "Qwen2RMSNorm"}),
    "gemma": (GemmaConfig(**GATED), {"attention": "GemmaAttention", "mlp": "GemmaMLP", "norm": "GemmaRMSNorm"}),
    "phi": (
        PhiConfig(**{**SMALL, "num_attention_heads": 3}, intermediate_size=40),
        {"attention": "PhiAttention", "mlp": "PhiMLP", "norm": "LayerNorm"},
    ),
    "opt": (
        OPTConfig(**SMALL, ffn_dim=40, word_embed_proj_dim=24, max_position_embeddings=32),
        {"attention": "OPTAttention", "norm": "LayerNorm"},
    ),
    "gpt2": (
        GPT2Config(vocab_size=48, n_embd=24, n_layer=3, n_head=4, n_positions=32, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0),
        {"attention": "GPT2Attention", "mlp": "GPT2MLP", "norm": "LayerNorm"},
    ),
    "gpt_neox": (
        GPTNeoXConfig(**SMALL, intermediate_size=40),
        {"attention": "GPTNeoXAttention", "mlp": "GPTNeoXMLP", "norm": "LayerNorm"},
    ),
}


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_modules_of_common_families_are_found(family: str, adapter: bool, tiny: Any, batch_of: Any) -> None:
    config, kinds = FAMILIES[family]
    torch.manual_seed(0)
    model: Any = tiny(num_hidden_layers=3) if config is None else AutoModelForCausalLM.from_config(config).eval()
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    layers = decoder_layers(model)
    assert len(layers) == 3
    assert modules_at(model, "layer") == layers
    batch = batch_of(2)
    for place, kind in kinds.items():
        modules = modules_at(model, place)  # type: ignore[arg-type]
        assert [type(module).__name__ for module in modules] == [kind] * (1 if place == "norm" else 3)
        if place != "norm":
            assert all(module in set(layer.modules()) for module, layer in zip(modules, layers, strict=True))
    found = gradients_at([*layers, *modules_at(model, "attention")], lambda: per_sample_nll(model, batch).mean())
    assert all(g.shape == (*batch.input_ids.shape, 24) and float(g.abs().max()) > 0 for g in found)
    # The last norm is the one before the head.
    with captured(modules_at(model, "norm")) as outputs:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(model.get_output_embeddings()(outputs[0]), logits)


def test_a_model_without_the_names_gives_one_clear_line() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES["opt"][0])
    with pytest.raises(ModelError) as caught:
        modules_at(model, "mlp")
    assert str(caught.value) == (
        "OPTForCausalLM has no mlp module under any of the names mlp, feed_forward, ffn, block_sparse_moe (there are: self_attn, "
        "activation_fn, self_attn_layer_norm, fc1, fc2, final_layer_norm); use an objective that does not tap it"
    )
    adapted = get_peft_model(model, LoraConfig(target_modules=["fc1"], task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match=r"^OPTForCausalLM has no mlp module"):  # the model's name, not PEFT's
        modules_at(adapted, "mlp")


def test_a_model_without_a_list_of_layers_gives_one_clear_line() -> None:
    class Odd(nn.Module):
        config = MistralConfig(num_hidden_layers=4)

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    with pytest.raises(ModelError, match=r"^Odd has no list of its 4 decoder layers; this objective cannot find them$"):
        decoder_layers(Odd())
