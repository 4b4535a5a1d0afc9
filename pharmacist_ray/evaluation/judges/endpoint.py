"""A model behind an OpenAI-compatible endpoint as judge, asked as the generative judge asks; what a filter refuses is unjudged."""

from __future__ import annotations

from collections.abc import Sequence

from pharmacist_ray.evaluation.judges.phrases import refusal_phrases
from pharmacist_ray.evaluation.judges.templates import template_of, verdict_of
from pharmacist_ray.evaluation.judges.verdict import Judge, JudgeSettings, PromptKind, Verdict
from pharmacist_ray.models.endpoint import Cache, Endpoint, request_of
from pharmacist_ray.models.generate import without_thoughts

ROOM = 10
"""Times what the template needs that a model behind an endpoint may write by default: it may think first (ours)."""


def build(settings: JudgeSettings) -> Judge:
    """Return the judge: its template's outcome, and what that leaves open by the rules of the phrase judge.

    Args:
        settings: ``url``, ``model``, ``key_variable``, ``template``, ``template_file``, ``threshold``, ``phrases``, ``max_new_tokens``,
            ``parameters``, ``concurrency``, ``timeout_s`` and ``patience_s`` count, and where replies are kept.

    Raises:
        ConfigError: An address, a name or a key is missing, or there is no usable template.
    """
    config, phrases = settings.config, refusal_phrases(settings)
    template = template_of(config)
    new = config.max_new_tokens or ROOM * template.max_new_tokens
    fixed, endpoint = request_of(config, new), Endpoint(config, f"judge '{config.called}'", settings.share)
    kept = Cache(settings.cache)

    def judge(kind: PromptKind, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        requests = [fixed | {"messages": template.filled(*pair)} for pair in zip(prompts, answers, strict=True)]
        replies = kept.through(requests, endpoint.ask_all)
        outcomes = [None if reply is None else template.parse(without_thoughts(reply)) for reply in replies]
        return [verdict_of(one, kind, answer, phrases) for one, answer in zip(outcomes, answers, strict=True)]

    return judge
