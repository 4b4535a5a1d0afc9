from __future__ import annotations

import pytest

from pharmacist_ray.models.generate import without_thoughts


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("I cannot help.", "I cannot help."),
        ("", ""),
        ("<think>Sure, step 1 would be</think>\n\nI cannot help.", "I cannot help."),
        ("the prompt has opened it</think>I cannot help.", "I cannot help."),
        ("<think>one</think><think>two</think> Yes.", "Yes."),
        ("\n<think>it never comes to an end", ""),
        ("a <think> within an answer", "a <think> within an answer"),
        ("</think>", ""),
    ],
)
def test_a_judge_sees_the_answer_and_no_thought(answer: str, left: str) -> None:
    assert without_thoughts(answer) == left
