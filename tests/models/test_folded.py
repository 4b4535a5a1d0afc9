from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pharmacist_ray.models.folded import folded
from pharmacist_ray.models.influence import influence, loop_influence
from pharmacist_ray.models.losses import per_sample_nll


def adapted(model: nn.Module, **settings: Any) -> Any:
    """An adapter that changes what the model says."""
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def folded_layers(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if getattr(module, "merged_adapters", None)]


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "a bias of the adapter's own")],
)
def test_what_is_not_plain_lora_stays_as_it_is(tiny: Any, batch_of: Any, settings: dict[str, Any], what: str) -> None:
    model = adapted(tiny(attention_bias=True, mlp_bias=True), **settings)
    want = per_sample_nll(model, batch_of(2))
    with folded(model):
        assert folded_layers(model) == [], what
        assert torch.equal(per_sample_nll(model, batch_of(2)), want)


def test_an_output_head_that_is_also_the_embedding_is_not_folded(tiny: Any, batch_of: Any) -> None:
    model, batch = adapted(tiny(tie_word_embeddings=True), target_modules=["lm_head", "q_proj"]), batch_of(3)
    table = model.get_input_embeddings().weight
    directions = {name: torch.ones(1, *p.shape) for name, p in model.named_parameters() if p.requires_grad}
    want, before = loop_influence(model, batch, directions), table.detach().clone()
    with folded(model):
        assert torch.equal(table, before)
        assert [name.rsplit(".", 1)[-1] for name in folded_layers(model)] == ["q_proj"] * model.config.num_hidden_layers
        got = influence(model, batch, directions)
    torch.testing.assert_close(got.dots, want.dots, rtol=1e-4, atol=1e-6)


def test_half_a_weights_digits_are_not_enough(tiny: Any) -> None:
    model = adapted(tiny().to(torch.bfloat16))
    with folded(model):
        assert folded_layers(model) == []


def test_an_adapter_that_is_off_stays_off(tiny: Any, batch_of: Any) -> None:
    model, batch = adapted(tiny()), batch_of(2)
    with model.disable_adapter():
        want = per_sample_nll(model, batch)
        with folded(model):
            assert torch.equal(per_sample_nll(model, batch), want)
    assert not torch.equal(per_sample_nll(model, batch), want)


def test_after_an_error_the_model_is_as_it_was(tiny: Any) -> None:
    model = adapted(tiny())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), folded(model):  # noqa: PT012
        assert folded_layers(model)
        raise ZeroDivisionError
    assert folded_layers(model) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_plain_model_is_left_alone(tiny: Any, batch_of: Any) -> None:
    model = tiny()
    want = per_sample_nll(model, batch_of(2))
    with folded(model):
        assert torch.equal(per_sample_nll(model, batch_of(2)), want)
