"""A model and how it is prompted: one value that every stage takes; nothing is read until it is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import, and whoever only passes the value on needs none of it
    import torch

    from pharmacist_ray.config.model import ModelConfig
    from pharmacist_ray.data.render import Renderer, Template
    from pharmacist_ray.storage import StoragePath


@dataclass(frozen=True)
class ModelRef:
    """Where a model's weights come from, and how rows become its input."""

    path: str
    """Folder or hub id of the base."""
    adapters: tuple[str, ...] = ()
    """Adapter folders, merged one after the other."""
    dtype: str = "float32"
    attn: str | None = None
    """Attention implementation; None leaves it to transformers."""
    quantization: str | None = None
    """``8bit`` or ``4bit``; None: all bits."""
    layers: int | None = None
    """Its first so many decoder layers alone; None: all."""
    trust_remote_code: bool = False
    template: Template = "auto"
    """Prompt template."""
    max_length: int = 256
    """Longest sequence in tokens, prompt and answer together."""
    system: str = ""
    """System prompt before every row that brings none of its own."""
    soft_prompt: str = ""
    """Folder of trained embeddings that stand before every question."""
    template_arguments: tuple[tuple[str, bool | int | float | str], ...] = ()
    """What the chat template is given besides the turns, by name."""

    @classmethod
    def of(cls, config: ModelConfig) -> ModelRef:
        """Return what a configuration's model section names, its precision resolved."""
        return cls(
            config.path,
            dtype=config.dtype,
            attn=config.attn,
            quantization=config.quantization,
            trust_remote_code=config.trust_remote_code,
            template=config.template,
            max_length=config.max_length,
            system=config.system,
            template_arguments=tuple(sorted(config.template_arguments.items())),
        )

    def plus(self, adapter: str) -> ModelRef:
        """Return the model with one more adapter merged."""
        return replace(self, adapters=(*self.adapters, adapter))

    def trained_in(self, folder: StoragePath, weights: str, *, prompt: bool = False) -> ModelRef:
        """Return what training on from here left in a folder.

        Args:
            folder: Of the training's output.
            weights: ``full`` where all weights were trained, else ``lora``.
            prompt: Whether it left a soft prompt too, for every question.
        """
        if prompt:
            return replace(self.trained_in(folder, weights), soft_prompt=str(folder / "prompt"))
        if weights == "full":
            return replace(self, path=str(folder / "model"), adapters=())
        return self.plus(str(folder / "adapter"))

    def load(self, device: str = "cpu", *, adapter: str | StoragePath | None = None) -> Any:
        """Return the model in evaluation mode, its adapters merged.

        Args:
            device: Where the weights go.
            adapter: One more adapter to put on top, unmerged and trainable.

        Raises:
            ModelError: See `load_model` and `load_adapter`.
        """
        from pharmacist_ray.models.load import load_adapter, load_model

        model: Any = load_model(
            self.path,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            attn=self.attn,
            quantization=self.quantization,
            layers=self.layers,
            device=device,
        )
        for merged in self.adapters:
            model = load_adapter(model, merged, merge=True)
        if adapter is not None:
            model = load_adapter(model, adapter)
            model = model if self.quantization else model.to(device)  # it is there already
        return model.eval()

    def loaded_prompt(self) -> torch.Tensor | None:
        """Return the embeddings that stand before every question, (tokens, H), if there are any."""
        from pharmacist_ray.models.soft_prompt import load_prompt

        return load_prompt(self.soft_prompt) if self.soft_prompt else None

    def renderer(self) -> Renderer:
        """Return what turns rows into the model's input, with its tokenizer.

        Raises:
            ModelError: There is no tokenizer, or it cannot do what the template needs.
        """
        from pharmacist_ray.data.render import Renderer
        from pharmacist_ray.models.load import load_tokenizer

        tokenizer = load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)
        arguments = dict(self.template_arguments)
        return Renderer(tokenizer, self.template, self.max_length, system=self.system, arguments=arguments)
