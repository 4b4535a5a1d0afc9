"""Per-sample gradients from what they are made of: a module's input and its output's gradient.

The two are all it takes for a linear layer, an embedding or a norm, and no gradient of a weight is built. They are caught by a
tap, an identity in the autograd graph: the input is saved, and under gradient checkpointing recomputed, like any activation.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pharmacist_ray.data.render import Batch
from pharmacist_ray.errors import ModelError
from pharmacist_ray.models.folded import at_factor, folded_factors
from pharmacist_ray.models.losses import per_sample_nll
from pharmacist_ray.models.taps import after_attention, decoder_layers

Owner = tuple[nn.Module, str]
"""A module, and what it calls a parameter of its own."""


@dataclass(frozen=True, eq=False)
class Part:
    """The share of one call of one module in the per-sample gradients of one of its parameters."""

    module: nn.Module
    attribute: str
    input: torch.Tensor
    """(B, T, …): activations, or token ids for an embedding."""
    output_grad: torch.Tensor
    """(B, T, …): the gradient of the summed losses; of sample i's loss in row i, as samples do not mix."""

    def gradient(self, rows: slice) -> torch.Tensor:
        """Return the gradients of some samples: (rows, *shape of the parameter), float32."""
        x, g = self.input[rows], self.output_grad[rows].float()
        if self.attribute == "bias":
            return g.flatten(1, -2).sum(1)
        if isinstance(self.module, nn.Linear):
            return torch.bmm(g.flatten(1, -2).transpose(1, 2), x.float().flatten(1, -2))
        if isinstance(self.module, nn.Embedding):
            g = _unpadded(self.module, x, g)
            vocabulary = self.module.num_embeddings
            grad = g.new_zeros(len(x) * vocabulary, g.shape[-1])
            ids = x + vocabulary * torch.arange(len(x), device=x.device)[:, None]
            return grad.index_add_(0, ids.flatten(), g.flatten(0, 1)).view(len(x), vocabulary, -1)
        return (g * _normed(self.module, x)).flatten(1, -2).sum(1)

    def product(self, v: torch.Tensor) -> torch.Tensor:
        """Return the gradients' products with directions ``v`` (K, *shape): (B, K), without forming a matrix gradient."""
        if self.attribute == "weight" and isinstance(self.module, nn.Linear):
            x, g = self.input.float().flatten(1, -2), self.output_grad.float().flatten(1, -2)
            if x.shape[-1] < g.shape[-1]:  # contract the longer side first: the result in between is the smaller one
                x, g, v = g, x, v.transpose(1, 2)
            return torch.einsum("btko,bto->bk", torch.einsum("bti,koi->btko", x, v), g)
        if isinstance(self.module, nn.Embedding):
            g = _unpadded(self.module, self.input, self.output_grad.float())
            return torch.stack([(table[self.input] * g).sum((1, 2)) for table in v], dim=1)
        return self.gradient(slice(None)) @ v.T


def tapped_losses(model: Any, batch: Batch, names: Collection[str], use: Callable[[str, list[Part]], None]) -> torch.Tensor:
    """Run one forward and backward, hand over what the named parameters' gradients are made of, and return the losses.

    The graph begins at the first of the parameters' modules: what lies below it is not differentiated, nor what lies beside it.

    Args:
        model: A causal language model whose parameters are all frozen; its adapter may be `folded` in.
        batch: Right-padded batch.
        names: The parameters to observe; linear, embedding and norm weights and biases.
        use: Called once per parameter, during the backward pass, with its parts: one, or as many as a tied weight has uses.

    Returns:
        Losses (B,), detached.

    Raises:
        ModelError: A parameter belongs to a module of another kind, takes no part in the forward pass, or sees the samples mixed.
    """
    pending: Counter[str] = Counter()
    parts: defaultdict[str, list[Part]] = defaultdict(list)
    forward = True
    start = torch.zeros((), requires_grad=True)  # of every tap: what has one behind it is in the graph

    def watch(site: nn.Module, watched: dict[str, Owner]) -> Callable[..., torch.Tensor]:
        def receive(x: torch.Tensor, grad: torch.Tensor) -> None:
            for name, (module, attribute) in watched.items():
                parts[name].append(Part(module, attribute, *((x, grad) if module is site else at_factor(site, module, x, grad))))
                pending[name] -= 1
                if not pending[name]:
                    use(name, parts.pop(name))

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            if len(x) != len(batch) or x.dim() < 2 + (not isinstance(site, nn.Embedding)):
                where = next(iter(watched))
                raise ModelError(f"{where}: its module's input {tuple(x.shape)} is not (samples, tokens, …); use 'difference'")
            if forward:  # and not when checkpointing repeats it
                pending.update(watched.keys())
            tapped: torch.Tensor = _Tap.apply(output, start, x.detach(), receive)  # type: ignore[no-untyped-call]
            return tapped

        return hook

    handles = []
    try:
        for site, watched in _sites(model, names).items():
            handles.append(site.register_forward_hook(watch(site, watched), with_kwargs=True))
        with torch.enable_grad():
            losses = per_sample_nll(model, batch)
            forward = False
            if idle := [name for name in names if name not in pending]:
                raise ModelError(f"{idle[0]} takes no part in the forward pass; leave it out of the directions")
            torch.autograd.grad(losses.sum(), start)
    finally:
        for handle in handles:
            handle.remove()
    for name in list(parts):  # calls whose result the loss does not depend on have sent nothing
        use(name, parts.pop(name))
    return losses.detach()


def last_layers(model: nn.Module, count: int, among: Collection[str]) -> set[str]:
    """Return which of some parameters are of the last decoder layers, all of them if there are no more layers than that.

    Of the first of these layers only what comes after its attention counts, if any parameter does: to differentiate an attention costs more
    than what its queries, keys and values add.

    Args:
        model: A causal language model, bare or inside PEFT.
        count: Layers.
        among: Names of parameters.

    Raises:
        ModelError: The model has no list of its decoder layers.
    """
    layers = decoder_layers(model)
    if count >= len(layers):
        return {*among}
    first, *others = layers[-count:]
    names = {id(parameter): name for name, parameter in model.named_parameters() if name in among}

    def found(*modules: nn.Module) -> set[str]:
        return {names[id(one)] for module in modules for one in module.parameters() if id(one) in names}

    return (found(*after_attention(first)) or found(first)) | found(*others)


class _Tap(torch.autograd.Function):
    """The identity on a module's output; its backward hands the module's input and the output's gradient to ``receive``.

    As a function of ``start`` it is a constant, whose gradient nobody reads; asking for it makes the backward pass come by.
    """

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, start: torch.Tensor, x: torch.Tensor, receive: Callable[..., None]
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.receive = receive
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        ctx.receive(*ctx.saved_tensors, grad)
        return grad, torch.zeros(()), None, None


def _sites(model: Any, names: Collection[str]) -> dict[nn.Module, dict[str, Owner]]:
    """Return the modules to tap, each with {name: whose parameter it is}: their owners, or of factors that are folded in the layer.

    A tied weight has two.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    wanted = {id(known[name]): name for name in names}
    layers = {factor: layer for layer in model.modules() for factor in folded_factors(layer)}
    sites: defaultdict[nn.Module, dict[str, Owner]] = defaultdict(dict)
    for module in model.modules():
        owned = {wanted[id(param)]: key for key, param in module.named_parameters(recurse=False) if id(param) in wanted}
        if owned and not (_covered(module) and set(owned.values()) <= {"weight", "bias"}):
            kind = type(module).__name__
            raise ModelError(f"no per-sample gradient for {next(iter(owned))} (a parameter of {kind}); use method 'difference'")
        if owned:
            sites[layers.get(module, module)] |= {name: (module, key) for name, key in owned.items()}
    return sites


def _covered(module: nn.Module) -> bool:
    """Whether the module computes what its class says: a subclass with a forward of its own may not."""
    if type(module).forward in (nn.Linear.forward, nn.Embedding.forward):
        return True
    return type(module).__name__.endswith("Norm") and getattr(module, "weight", torch.empty(0)).dim() == 1


def _unpadded(module: nn.Embedding, ids: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Autograd gives an embedding's padding row no gradient; do the same."""
    return grad if module.padding_idx is None else grad * (ids != module.padding_idx)[..., None]


def _normed(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what a norm multiplies its weight with: f(1) − f(0), as it is affine in the weight (also Gemma's, with 1 + w)."""
    outputs: list[torch.Tensor] = []
    for fill in (torch.ones, torch.zeros):
        probe = copy.copy(module)  # shares everything but the table of parameters
        probe._parameters = {"weight": nn.Parameter(fill(x.shape[-1], device=x.device), requires_grad=False), "bias": None}
        outputs.append(type(module).forward(probe, x.float()))
    return outputs[0] - outputs[1]
