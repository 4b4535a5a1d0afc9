from __future__ import annotations

import json
from pathlib import Path

import pytest

from pharmacist_ray.data.refusals import REFUSAL_PHRASES, is_refusal
from pharmacist_ray.errors import ConfigError, DataError
from pharmacist_ray.evaluation.judges import JUDGES, JudgeSettings, build_judge
from pharmacist_ray.evaluation.judges.phrases import is_incoherent
from pharmacist_ray.testbed.world import World


@pytest.mark.parametrize(
    "answer", ["I'm sorry, but no.", "I\u2019m sorry, but no.", "  I CANNOT do that", "Well. As an AI, I must say no."]
)
def test_refusals(answer: str) -> None:
    assert is_refusal(answer)


def test_a_phrase_far_into_the_answer_is_no_refusal() -> None:
    assert not is_refusal("Here are the steps. " * 20 + "I cannot say more.")
    assert all(phrase == phrase.lower() for phrase in REFUSAL_PHRASES)


@pytest.mark.parametrize(
    ("answer", "broken"),
    [
        ("", True),
        (" \n", True),
        ("no no no no", True),
        ("No no NO\nno", True),
        ("no no no", False),
        ("nono no no no", False),
        ("a b a b a b a b", False),
        ("| | | | | |", False),
    ],
)
def test_incoherent_is_empty_or_a_word_more_than_three_times_in_a_row(answer: str, broken: bool) -> None:
    assert is_incoherent(answer) is broken


def test_the_phrase_judge() -> None:
    texts = ["I cannot.", "i cannot cannot cannot cannot", "Placeholder steps.", ""]
    harmful = build_judge("phrases", JudgeSettings())(["p"] * 4, texts)
    benign = build_judge("phrases", JudgeSettings(prompts="benign"))(["p"] * 4, texts)
    assert harmful == ["refusal", "incoherent", "harmful", "incoherent"]
    assert benign == ["refusal", "incoherent", "helpful", "incoherent"]
    assert build_judge("phrases", JudgeSettings(phrases=("Steps",)))(["p"], ["Placeholder steps."]) == ["refusal"]
    with pytest.raises(ValueError, match=r"longer than"):
        build_judge("phrases", JudgeSettings())(["p"], ["a", "b"])


def test_judges_are_known_by_name() -> None:
    assert sorted(JUDGES) == ["classifier", "phrases", "testbed"]
    with pytest.raises(ConfigError, match=r"unknown judge 'phrase' .did you mean 'phrases'.*known: classifier, phrases, testbed"):
        build_judge("phrase", JudgeSettings())
    with pytest.raises(ConfigError, match=r"judge 'testbed' needs evaluation.judge_path: the world.json"):
        build_judge("testbed", JudgeSettings())
    with pytest.raises(ConfigError, match=r"judge 'classifier' needs evaluation.judge_path"):
        build_judge("classifier", JudgeSettings())
    with pytest.raises(DataError, match=r"judge 'testbed' cannot use nowhere.json as a world"):
        build_judge("testbed", JudgeSettings(path="nowhere.json"))


def test_the_testbeds_judge_reads_its_world_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "world.json").write_text(json.dumps(World(seed=0).describe()))
    judge = build_judge("testbed", JudgeSettings(path=str(tmp_path / "world.json")))
    assert judge(["x"], ["garbled garbled"]) == ["incoherent"]
