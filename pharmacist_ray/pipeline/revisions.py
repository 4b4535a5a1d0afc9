"""The stages' revisions: what of the code itself an artifact's fingerprint holds.

Raise a stage's revision when the same inputs give another result than before, by adding the reason to its list; what the stage made
before, and all that was made from it, is then made anew. Leave it alone when only speed, messages or file layouts that readers still
understand change: nobody should score a billion rows again for a release that scores them the same.
"""

from __future__ import annotations

FIRST = "0.1.0"
"""How revision 1 is spelled in a fingerprint. Version 0.1.0 hashed its own version into every fingerprint, and stages whose results
are still the same must find what it made."""

REASONS: dict[str, list[str]] = {
    "ingest": [],
    "fit": [],
    "score": [],
    "select": [],
    "align": [],
    "attack": [],
    "evaluate": [
        "intervals draw prompts once for all runs, in whole clusters, and incoherent answers are counted by kind of prompt",
        "the mean over attacks leaves out those that taught the user's task to nobody",
        "answers beside the point (a label of the task, or the same few words to many prompts) are neither harm nor help",
    ],
}
"""Stage → why its revision was raised, each time in words that follow "since then"; the revision is one more than there are reasons."""


def revision(stage: str) -> int:
    """Return the stage's revision, from 1."""
    return 1 + len(REASONS.get(stage, []))


def spelled(stage: str) -> str | int:
    """Return the stage's revision as fingerprints hold it."""
    return revision(stage) if REASONS.get(stage) else FIRST


def raised_since(stage: str, before: int) -> str:
    """Return why the revision is no longer ``before``, in words."""
    return "; ".join(REASONS.get(stage, [])[before - 1 :]) or "this version of the package is older"
