"""What is asked and how answers are judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pharmacist_ray.config.data import PromptsConfig, SourceConfig
from pharmacist_ray.config.endpoint import HOW as ENDPOINT_HOW
from pharmacist_ray.config.endpoint import EndpointConfig
from pharmacist_ray.config.section import Count, Location, Section, Share


class EngineConfig(EndpointConfig):
    """Who answers in the place of this program: an OpenAI-compatible endpoint that serves the base.

    It takes prompts as token ids and loads LoRA adapters by request, as vLLM does: `vllm serve BASE --enable-lora --max-lora-rank 64` with
    `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`.
    """

    kind: Literal["endpoint"] = "endpoint"
    """The other kind is `vllm`."""


class VllmConfig(Section):
    """Who answers in the place of transformers: vLLM, in `resources.actors` engines that Ray Data starts.

    Each loads the base once, and every model's adapters by request; needs `pip install 'pharmacist-ray[vllm]'`.
    """

    kind: Literal["vllm"]
    """Tells it from an endpoint."""
    tensor_parallel: Count = 1
    """GPUs that hold the base together."""
    options: dict[str, Any] = {}
    """Further engine arguments of vLLM, for example `{gpu_memory_utilization: 0.8}`."""


def _engine(value: object) -> str:
    """Return which kind of engine a value is meant to be; an endpoint where it says none."""
    return str(value.get("kind", "endpoint") if isinstance(value, dict) else getattr(value, "kind", "endpoint"))


_Engine = Annotated[
    Annotated[EngineConfig, Tag("endpoint")] | Annotated[VllmConfig, Tag("vllm")],
    Discriminator(_engine, custom_error_type="kind", custom_error_message="kind must be one of 'endpoint', 'vllm'"),
]


class TaskEvaluation(Section):
    """Accuracy on the user's task."""

    source: SourceConfig
    """Test rows: prompt → expected answer."""
    checker: Literal["exact", "contains", "number"] = "exact"
    """How an answer is compared with the expected one; `exact` and `contains` are reported both."""


class JudgeConfig(EndpointConfig):
    """One judge with its settings; each kind takes what it knows."""

    kind: str
    """Which judge; `pharmacist doctor` lists all."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]*$")] = ""
    """What tables call it, where there are several; default: its kind."""
    path: Location | None = None
    """Folder or hub id of its model (classifier, generative), or the world file (testbed)."""
    template: str | None = None
    """What it is asked. For generative and endpoint a named template: harmbench, strongreject or llama-guard. For a classifier its
    input, with `{prompt}` and `{answer}`; default: that of beaver-dam-7b."""
    template_file: Location | None = None
    """For generative and endpoint: a YAML file with a question of yours, in place of a named template."""
    phrases: list[str] = []
    """Refusal phrases instead of the built-in ones."""
    threshold: Share = 0.5
    """Harmful is above it: the probability of one of a classifier's labels (published: 0.5), or the score of strongreject (ours)."""
    labels: list[str] = []
    """A classifier's labels that count as harmful; none means all."""
    append_eos: bool = True
    """Whether a classifier's input ends with the end-of-sequence token, if there is one."""
    max_length: Count = 256
    """A classifier's longest input in tokens; the rest is cut off on the right (published: 256)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of a generative judge's weights."""
    max_new_tokens: Count | None = None
    """Longest reply of a generative judge or an endpoint, in tokens; default: what the template needs, and ten times that for an
    endpoint, whose model may think first."""
    batch_size: Count = 16
    """Answers per pass of a classifier or a generative judge."""

    @model_validator(mode="after")
    def _one_template(self) -> JudgeConfig:
        if self.template and self.template_file:
            raise ValueError(f"judge '{self.kind}': give template or template_file, not both")
        return self

    @property
    def called(self) -> str:
        """What tables call it."""
        return self.name or self.kind


def _form(value: object) -> str:
    """Return which form of a judge, or of several, a value is meant to be, so that an error is about that one alone."""
    return "name" if isinstance(value, str) else "several" if isinstance(value, list) else "settings"


_NAMED = Annotated[str, Tag("name")]
_SET = Annotated[JudgeConfig, Tag("settings")]
_One = Annotated[_NAMED | _SET, Discriminator(lambda value: "name" if isinstance(value, str) else "settings")]
_Several = Annotated[list[_One], Field(min_length=1), Tag("several")]

HOW = (*ENDPOINT_HOW, "batch_size")
"""Keys of a judge that say how it is asked; no verdict hangs on them."""


UNASKED = ("bootstrap_draws", "allow_trained_prompts", "lm_eval", "inspect", "engine")
"""Keys of the section on which no answer hangs."""


class HarnessConfig(Section):
    """Tasks of lm-evaluation-harness by which every model is measured too."""

    tasks: list[str] = []
    """Their names, for example `[arc_easy, gsm8k]`; needs `pip install 'pharmacist-ray[lm-eval]'`."""
    include: Location | None = None
    """A folder with YAML files of tasks of your own."""
    limit: Count | None = None
    """At most so many examples of a task."""
    batch_size: Count = 16
    """Examples at a time."""


_HARNESS = HarnessConfig()


class EvaluationConfig(Section):
    """What is asked and how answers are judged."""

    harmful_prompts: PromptsConfig
    """Harmful prompts never trained on, for example `{name: harmbench}`."""
    benign_prompts: PromptsConfig
    """Ordinary prompts, for over-refusal, for example `{name: xstest-safe}`."""
    task: TaskEvaluation
    judge: Annotated[_NAMED | _SET | _Several, Discriminator(_form)] = "phrases"
    """Which judge, by name or with its settings (`{kind: generative, path: …, template: harmbench}`); `pharmacist plugins` lists all, and
    one of your own is `module:attribute`. Of several in a list the first decides the figures, and the report says how far the others
    agree with it."""
    judge_path: Location | None = None
    """The model folder (classifier) or world file (testbed) of a judge that is given by name."""
    max_new_tokens: Count = 128
    """Longest answer in tokens (Vaccine's public code: 128)."""
    batch_size: Count = 64
    """Prompts per generation batch."""
    engine: _Engine | None = Field(default=None, exclude_if=lambda value: value is None)
    """Who answers: None is transformers, on `resources.actors`. An endpoint (`{url: …, model: BASE}`) is given each model's adapters, so
    the run directory has to be a folder that it reads; and so is vLLM (`{kind: vllm, tensor_parallel: 4}`)."""
    bootstrap_draws: Count = 2000
    """Draws of the bootstrap over runs and clusters of prompts."""
    group_column: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """A column of `harmful_prompts` by which the harmful score and refusals are reported apart too, for example what your trusted
    rows cover and what they do not."""
    cluster_column: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """A column of the prompts that says which belong together, for example what they ask for; intervals count such prompts as one.
    A prompt without it is on its own."""
    allow_trained_prompts: bool = Field(default=False, exclude_if=lambda value: not value)
    """Ask for prompts that are in a set that is trained on as well; else that ends the run before anything is trained."""

    lm_eval: HarnessConfig = Field(default=_HARNESS, exclude_if=lambda value: value == _HARNESS)
    inspect: bool = Field(default=False, exclude_if=lambda value: not value)
    """Write answers and verdicts as logs of inspect too, for its viewer; needs `pip install 'pharmacist-ray[inspect]'`."""

    @model_validator(mode="after")
    def _judges_differ(self) -> EvaluationConfig:
        names = [judge.called for judge in self.judges]
        if len(set(names)) != len(names):
            raise ValueError(f"the judges in evaluation.judge must differ by kind or name, got {', '.join(names)}")
        return self

    @property
    def judges(self) -> list[JudgeConfig]:
        """The judges; the first decides the figures."""
        given = self.judge if isinstance(self.judge, list) else [self.judge]
        return [JudgeConfig(kind=one, path=self.judge_path) if isinstance(one, str) else one for one in given]

    @property
    def judge_places(self) -> list[str]:
        """Where the models and templates of judges with settings lie."""
        given = self.judge if isinstance(self.judge, list) else [self.judge]
        return [place for one in given if isinstance(one, JudgeConfig) for place in (one.path, one.template_file) if place]

    def with_judges(self, change: Callable[[JudgeConfig], JudgeConfig]) -> EvaluationConfig:
        """Return the section with another value in the place of each judge that has settings."""

        def changed(one: str | JudgeConfig) -> str | JudgeConfig:
            return change(one) if isinstance(one, JudgeConfig) else one

        judge = [changed(one) for one in self.judge] if isinstance(self.judge, list) else changed(self.judge)
        return self.model_copy(update={"judge": judge})
