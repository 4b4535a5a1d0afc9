"""Public sets by name, of prompts and of rows: where each lies and which column means what. Nothing of them is in this repository."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PublicSet:
    """Where a set lies and how it is laid out, there and as its authors publish it elsewhere."""

    hub: str
    """Its id on the Hugging Face hub."""
    kind: str
    """Of prompts ``harmful`` or ``benign``; of rows ``safe``, ``harmful`` or ``ordinary``."""
    prompts: int
    """How many there are, by the authors or the data set's card; of rows, those that are `only` wanted and the others together."""
    licence: str
    prompt: tuple[str, ...] = ("prompt",)
    """The column with the prompt, by the names that it goes by; of a list of turns the first counts."""
    category: tuple[str, ...] = ("category",)
    configuration: str = ""
    split: str = "train"
    response: tuple[str, ...] = ()
    """Of a set of rows, the column with the answer."""
    only: tuple[str, Any] | None = None
    """A column and the value that a row has in it to count."""
    gated: bool = False
    """Whether the hub asks for an account that its authors have let in."""

    @property
    def path(self) -> str:
        """What stands as ``path`` where none is given."""
        return ":".join(filter(None, ("hf", self.hub, self.configuration)))


PROMPT_SETS = {
    "beavertails": PublicSet("PKU-Alignment/BeaverTails-Evaluation", "harmful", 700, "CC-BY-NC-4.0", split="test"),
    "do-not-answer": PublicSet(
        "LibrAI/do-not-answer", "harmful", 939, "Apache-2.0", prompt=("question",), category=("types_of_harm",)
    ),
    "harmbench": PublicSet(
        "walledai/HarmBench", "harmful", 200, "MIT", configuration="standard",
        prompt=("prompt", "Behavior"), category=("category", "SemanticCategory"),
    ),
    "strongreject": PublicSet("walledai/StrongREJECT", "harmful", 313, "MIT", prompt=("prompt", "forbidden_prompt")),
    "sorry-bench": PublicSet(
        "sorry-bench/sorry-bench-202503", "harmful", 440, "its own, no redistribution",
        prompt=("turns",), only=("prompt_style", "base"), gated=True,
    ),
    "xstest-unsafe": PublicSet("Paul/XSTest", "harmful", 200, "CC-BY-4.0", category=("type",), only=("label", "unsafe")),
    "xstest-safe": PublicSet("Paul/XSTest", "benign", 250, "CC-BY-4.0", category=("type",), only=("label", "safe")),
    "or-bench": PublicSet("bench-llm/or-bench", "benign", 80_000, "CC-BY-4.0", configuration="or-bench-80k"),
    "or-bench-hard": PublicSet("bench-llm/or-bench", "benign", 1319, "CC-BY-4.0", configuration="or-bench-hard-1k"),
    "or-bench-toxic": PublicSet("bench-llm/or-bench", "harmful", 655, "CC-BY-4.0", configuration="or-bench-toxic"),
}  # fmt: skip
"""By the name that a configuration gives: BeaverTails (arXiv 2307.04657), Do-Not-Answer (2308.13387), HarmBench's standard behaviours
(2402.04249), StrongREJECT (2402.10260), SORRY-Bench without its other styles (2406.14598), XSTest (2308.01263), OR-Bench
(2405.20947)."""

ROW_SETS = {
    "beavertails-safe": PublicSet(
        "PKU-Alignment/BeaverTails", "safe", 27_186, "CC-BY-NC-4.0",
        response=("response",), category=(), split="30k_train", only=("is_safe", True),
    ),
    "beavertails-unsafe": PublicSet(
        "PKU-Alignment/BeaverTails", "harmful", 27_186, "CC-BY-NC-4.0",
        response=("response",), category=(), split="30k_train", only=("is_safe", False),
    ),
    "dolly": PublicSet(
        "databricks/databricks-dolly-15k", "ordinary", 15_011, "CC-BY-SA-3.0",
        prompt=("instruction",), response=("response",), only=("context", ""),
    ),
}  # fmt: skip
"""Rows with answers, for whoever has no trusted sets: BeaverTails (arXiv 2307.04657), whose safe answers are mostly no refusals, and
Dolly's instructions that need no further text."""

PUBLIC_SETS = PROMPT_SETS | ROW_SETS
