"""Answers by vLLM on Ray Data's own processor for it: each engine loads the base once, and a model is an adapter by request.

What is written are the answers' texts, beside where the judged answers are to be; who judges reads them there. vLLM is asked the token ids
that transformers would be asked and decodes greedily too; where two tokens all but tie, its rounding may decide otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson
import ray

from pharmacist_ray.config.evaluation import VllmConfig
from pharmacist_ray.config.schema import ResourcesConfig
from pharmacist_ray.data.render import Renderer
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.models.adapters import short_name, stacked
from pharmacist_ray.models.hub import on_disk
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.runtime.actors import plain_errors
from pharmacist_ray.storage import StoragePath, storage_path, write_text

Question = tuple[str, ModelRef, Callable[[Renderer], list[list[int]]]]
"""Where the judged answers are to be, whose they are, and what returns the token ids of the questions."""

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks of adapters that vLLM can be told of."""

AT_ONCE = 64
"""Questions of a batch that Ray Data hands over; the engine makes batches of its own (Ray's example)."""


def check_vllm() -> None:
    """Find out whether vLLM is here.

    Raises:
        ConfigError: It is not.
    """
    if find_spec("vllm") is None:
        raise ConfigError(
            "evaluation.engine: vLLM is not installed; pip install 'pharmacist-ray[vllm]' on every node, or leave it out"
        )


def texts_file(answers: str) -> StoragePath:
    """Return where the texts of answers are kept until they are judged.

    Args:
        answers: Where the judged answers are to be.
    """
    file = storage_path(answers)
    return file.with_name(f"{file.name}.texts.json")


def ask(
    questions: Sequence[Question],
    *,
    engine: VllmConfig,
    max_new_tokens: int,
    resources: ResourcesConfig,
    adapters: Path,
    runtime_env: dict[str, Any] | None = None,
) -> None:
    """Write the texts of all answers that are not there, each set's when it is whole.

    Args:
        questions: What to ask; all models have one base.
        engine: The engine's section.
        max_new_tokens: The longest answer.
        resources: ``actors`` engines.
        adapters: Folder for each model's adapters as one, which every node reads.
        runtime_env: Ray's environment of the engines; None: the job's.

    Raises:
        ResourceError: Engines died more often than they are replaced.
    """
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig  # slow to import

    left = [one for one in questions if not texts_file(one[0]).exists()]
    if not left:
        return
    base = left[0][1]
    names, rank = _given(left, adapters)
    options: dict[str, Any] = {
        "dtype": base.dtype,
        "tensor_parallel_size": engine.tensor_parallel,
        "trust_remote_code": base.trust_remote_code,
        **({"enable_lora": True, "max_lora_rank": next((one for one in RANKS if one >= rank), rank)} if rank else {}),
        **engine.options,
    }
    gpu = {"GPU": 1.0} if resources.gpus_per_worker else {}
    config = vLLMEngineProcessorConfig(
        model_source=str(on_disk(base.path)),
        engine_kwargs=options,
        batch_size=AT_ONCE,
        concurrency=resources.actors,
        placement_group_config={"bundle_per_worker": {"CPU": resources.cpus_per_worker, **gpu}},
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        log_engine_metrics=False,
        runtime_env=runtime_env,
    )
    sampling = {"temperature": 0.0, "max_tokens": max_new_tokens}
    asked = ray.data.from_items([{"set": place} for place in range(len(left))], override_num_blocks=len(left)).flat_map(
        partial(_rows, questions=left, names=names, sampling=sampling)
    )
    found: dict[int, dict[int, str]] = defaultdict(dict)
    with plain_errors("evaluate"):
        answered = build_processor(config, preprocess=dict, postprocess=_text)(asked)
        for row in answered.iter_rows():
            texts = found[row["set"]]
            texts[row["place"]] = row["text"]
            if len(texts) == row["count"]:
                whole = [texts[place] for place in range(len(texts))]
                write_text(orjson.dumps(whole).decode(), texts_file(left[row["set"]][0]))
                del found[row["set"]]


def _given(questions: Sequence[Question], folder: Path) -> tuple[dict[ModelRef, str], int]:
    """Write each model's adapters as one; return what the engine calls each model, and the largest rank; 0: none has any."""
    names, rank = dict[ModelRef, str](), 0
    for _, model, _ in questions:
        if model in names:
            continue
        names[model] = str(on_disk(model.path))
        if model.adapters:
            place = folder / f"vllm-{short_name(model.adapters)}"
            rank = max(rank, stacked(model.adapters, names[model], place))
            names[model] = str(place.resolve())
    return names, rank


def _rows(
    row: dict[str, Any], *, questions: Sequence[Question], names: dict[ModelRef, str], sampling: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the questions of one set as Ray Data's stage for vLLM takes them."""
    _, model, ids_of = questions[row["set"]]
    renderer = _renderer(model)
    prompts = ids_of(renderer)
    for place, ids in enumerate(prompts):
        yield {
            "set": row["set"],
            "place": place,
            "count": len(prompts),
            "tokenized_prompt": ids,
            "model": names[model],
            "sampling_params": sampling | {"stop_token_ids": [renderer.end_id]},
        }


@cache
def _renderer(model: ModelRef) -> Renderer:
    return model.renderer()


def _text(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("set", "place", "count")} | {"text": row["generated_text"]}
