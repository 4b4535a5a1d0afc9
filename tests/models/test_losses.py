from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pharmacist_ray.data.render import IGNORE, Batch
from pharmacist_ray.models.losses import per_sample_nll, surrogate, token_nll


def rows(batch: Batch, index: torch.Tensor) -> Batch:
    return Batch(batch.input_ids[index], batch.attention_mask[index], batch.labels[index])


def test_a_value_by_hand() -> None:
    """A model over three tokens that gives the token p the probabilities (1/2, 1/4, 1/4), rotated by p."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Identity()

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
            table = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]).log()
            return SimpleNamespace(logits=self.head(table[input_ids]))

    ids = torch.tensor([[0, 1, 1, 2, 2], [1, 0, 0, 0, 0]])
    labels = torch.tensor([[IGNORE, IGNORE, 1, 2, 2], [IGNORE, 0, 0, IGNORE, IGNORE]])
    batch = Batch(ids, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]), labels)
    half, quarter = math.log(2), math.log(4)
    model = Model()
    nll, mask = token_nll(model, batch)
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    torch.testing.assert_close(nll, torch.tensor([[half, quarter, half], [quarter, half, 0]]))
    torch.testing.assert_close(per_sample_nll(model, batch), torch.tensor([(2 * half + quarter) / 3, (quarter + half) / 2]))
    assert not model.head._forward_pre_hooks


def test_the_output_head_is_given_supervised_positions_alone(tiny: Any, batch_of: Any) -> None:
    model, batch = tiny(), batch_of(4)
    given: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, args, output: given.append(output.shape))
    nll, mask = token_nll(model, batch)
    assert given[0][:2] == nll.shape == (4, int((batch.labels != IGNORE).sum(1).max()))
    whole = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].log_softmax(-1)
    for row, labels in enumerate(batch.labels[:, 1:]):
        where = labels != IGNORE
        want = -whole[row, where].gather(1, labels[where, None])[:, 0]
        torch.testing.assert_close(nll[row, mask[row].bool()], want)


def test_one_sample_equals_the_models_own_loss(tiny: Any, batch_of: Any) -> None:
    model = tiny()
    for seed in range(5):
        batch = batch_of(1, seed=seed)
        own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        torch.testing.assert_close(per_sample_nll(model, batch)[0], own, rtol=1e-6, atol=0)


def test_padding_changes_nothing(tiny: Any, batch_of: Any) -> None:
    model, batch = tiny(), batch_of(4)
    wide = Batch(
        nn.functional.pad(batch.input_ids, (0, 5), value=7),  # even a real token
        nn.functional.pad(batch.attention_mask, (0, 5), value=0),
        nn.functional.pad(batch.labels, (0, 5), value=IGNORE),
    )
    torch.testing.assert_close(per_sample_nll(model, wide), per_sample_nll(model, batch), rtol=1e-5, atol=1e-6)


def test_no_sample_sees_its_batch(tiny: Any, batch_of: Any) -> None:
    model, batch = tiny(), batch_of(8)
    whole = per_sample_nll(model, batch)
    order = torch.tensor([6, 1, 3])
    torch.testing.assert_close(per_sample_nll(model, rows(batch, order)), whole[order], rtol=1e-5, atol=1e-6)
    for index in range(8):
        length = int(batch.attention_mask[index].sum())
        alone = Batch(*(t[index : index + 1, :length] for t in (batch.input_ids, batch.attention_mask, batch.labels)))
        torch.testing.assert_close(per_sample_nll(model, alone), whole[index : index + 1], rtol=1e-5, atol=1e-6)


def test_low_precision_models_give_float32_losses(tiny: Any, batch_of: Any) -> None:
    losses = per_sample_nll(tiny().to(torch.bfloat16), batch_of(3))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, per_sample_nll(tiny(), batch_of(3)), rtol=2e-2, atol=0)


def test_adapters_and_wrappers_give_the_same(tiny: Any, batch_of: Any) -> None:
    class Engine(nn.Module):  # as DeepSpeed's: forwards all arguments to .module, and has what that has
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name) if name == "module" else getattr(self.module, name)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    batch = batch_of(3)
    want = per_sample_nll(tiny(), batch)
    adapted = get_peft_model(tiny(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))  # B = 0
    torch.testing.assert_close(per_sample_nll(adapted, batch), want)
    torch.testing.assert_close(per_sample_nll(Engine(adapted), batch), want)


@pytest.mark.parametrize("seed", [0, 1])
def test_its_gradient_is_that_of_the_mean_over_the_answer(tiny: Any, batch_of: Any, seed: int) -> None:
    model, batch = tiny(), batch_of(1, seed=seed)
    weight = model.lm_head.weight
    (got,) = torch.autograd.grad(per_sample_nll(model, batch).sum(), weight)
    (want,) = torch.autograd.grad(model(input_ids=batch.input_ids, labels=batch.labels).loss, weight)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("value", [0.0, 3.5, torch.tensor(-2.0)])
def test_a_surrogate_has_the_value_and_the_gradients_it_is_given(value: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, requires_grad=True) for shape in ((3,), (2, 4), ())]
    gradients = [torch.randn(x.shape, generator=generator) for x in tensors]
    scalar = surrogate(tensors, gradients, value)
    assert float(scalar.detach()) == float(value)
    scalar.backward()
    for x, g in zip(tensors, gradients, strict=True):
        assert torch.equal(x.grad, g)


def test_a_surrogate_passes_its_gradients_on_through_a_graph_and_never_into_them() -> None:
    weight = torch.tensor([2.0, -1.0], requires_grad=True)
    gradients = torch.tensor([0.5, 4.0], requires_grad=True)
    surrogate([weight**3], [gradients * 1.0]).backward()
    assert torch.equal(weight.grad, torch.tensor([0.5 * 3 * 4.0, 4.0 * 3 * 1.0]))
    assert gradients.grad is None


def test_a_surrogate_is_float32_over_low_precision_and_gives_the_tensors_their_own() -> None:
    x = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    scalar = surrogate([x], [torch.full((4,), 1.5)])
    scalar.backward()
    assert scalar.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16
    assert x.grad.tolist() == [1.5] * 4


def test_a_surrogate_needs_one_gradient_per_tensor() -> None:
    with pytest.raises(ValueError, match="zip"):
        surrogate([torch.ones(1, requires_grad=True)], [])
