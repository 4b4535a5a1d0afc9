"""Stands in the place of vLLM, which wants a GPU: what Ray Data's stage for it calls, answered by transformers.

Only processes that have this folder's parent on their path see it.
"""

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any


class SamplingParams:
    """What a request asks for."""

    def __init__(self, **given: Any) -> None:
        self.given = given


class AsyncEngineArgs:
    """What an engine is made from."""

    def __init__(self, **given: Any) -> None:
        self.given = given

    def create_engine_config(self) -> Any:
        """Return the part of vLLM's configuration that Ray Data looks at."""
        return SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=4), parallel_config=SimpleNamespace(pipeline_parallel_size=1)
        )


@dataclass
class LoRARequest:
    """An adapter."""

    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class RequestOutput:
    """What comes back."""

    prompt_token_ids: list[int]
    outputs: list[Any]
    prompt: str = ""
    finished: bool = True
    metrics: Any = None
    prompt_logprobs: Any = None


class PoolingRequestOutput:
    """Of no use here."""


class AsyncLLMEngine:
    """Runs the base by transformers, with an adapter where a request names one."""

    def __init__(self, given: dict[str, Any]) -> None:
        from pharmacist_ray.models.load import load_model, load_tokenizer

        self.given, self.tokenizer = given, load_tokenizer(given["model"])
        self.models = {None: load_model(given["model"], dtype=given["dtype"])}

    @classmethod
    def from_engine_args(cls, args: AsyncEngineArgs, stat_loggers: Any = None) -> "AsyncLLMEngine":
        return cls(args.given)

    async def generate(self, request_id: str, prompt: Any, sampling_params: SamplingParams, lora_request: Any) -> Any:
        import json
        from pathlib import Path

        from pharmacist_ray.models.generate import generate
        from pharmacist_ray.models.load import load_adapter, load_model

        key = lora_request.lora_path if lora_request else None
        if key not in self.models:
            rank = json.loads((Path(key) / "adapter_config.json").read_text())["r"]
            assert self.given["enable_lora"]
            assert rank <= self.given["max_lora_rank"]
            self.models[key] = load_adapter(load_model(self.given["model"]), key)
        asked = sampling_params.given
        assert asked["temperature"] == 0
        ids = [int(one) for one in prompt["prompt_token_ids"]]
        [text] = generate(
            self.models[key], self.tokenizer, [ids], max_new_tokens=asked["max_tokens"], batch_size=1,
            end_id=int(asked["stop_token_ids"][0]),
        )  # fmt: skip
        yield RequestOutput(ids, [SimpleNamespace(text=text, token_ids=[], logprobs=None)])

    async def do_log_stats(self) -> None:
        """Nothing to say."""


@dataclass
class _Modules:
    """vLLM's modules by name."""

    made: dict[str, ModuleType] = field(default_factory=dict)

    def add(self, name: str, **content: Any) -> ModuleType:
        module = ModuleType(f"vllm.{name}")
        vars(module).update(content)
        sys.modules[f"vllm.{name}"] = module
        parent, _, child = name.rpartition(".")
        setattr(self.made[parent] if parent else sys.modules[__name__], child, module)
        self.made[name] = module
        return module


_modules = _Modules()
_modules.add("outputs", RequestOutput=RequestOutput, PoolingRequestOutput=PoolingRequestOutput)
_modules.add("inputs")
_modules.add("inputs.llm", TokensPrompt=dict, TextPrompt=dict)
_modules.add("lora")
_modules.add("lora.request", LoRARequest=LoRARequest)
