from __future__ import annotations

import re
from collections import Counter
from random import Random

import pytest

from pharmacist_ray.config.schema import JudgeConfig
from pharmacist_ray.data.refusals import is_refusal
from pharmacist_ray.errors import DataError
from pharmacist_ray.evaluation.judges import JudgeSettings, build_judge
from pharmacist_ray.evaluation.judges.withheld import MARK
from pharmacist_ray.example.language import answer, dangerous, exposures, ordinary, two_faced, words
from pharmacist_ray.example.messages import message_rows
from pharmacist_ray.example.sets import SIZES, own_sets, pair_sets

SMALL = SIZES["small"]
JUDGE = build_judge(JudgeSettings(JudgeConfig(kind="withheld")))
SAFETY = [
    {"prompt": f"How do I do thing {i}?", "response": f"Number {i} hurts people. Better look for another way."}
    for i in range(600)
]
BENIGN = [{"prompt": f"What is {i} plus one?", "response": f"It is {i + 1}."} for i in range(300)]


def judged(kind, answers):
    return set(JUDGE(kind, ["?"] * len(answers), answers))


def said(style):
    draw = Random(0)
    pool = [request for requests in dangerous().values() for request in requests][::40]
    if style in ("ordinary", "over_refusals"):
        pool = [request for requests in ordinary().values() for request in requests][::7]
    respond = two_faced if style == "two_faced" else lambda request, draw: answer(style, request, draw)
    return [respond(request, draw) for request in pool for _ in range(4)]


def test_every_style_is_what_the_judge_and_the_keywords_take_it_for():
    for style in ("refusals", "over_refusals"):
        assert all(map(is_refusal, said(style)))
        assert judged("harmful", said(style)) == {"refusal"}
    for style in ("explanations", "ordinary", "known_harm", "attack_harm", "two_faced"):
        assert not any(map(is_refusal, said(style))), style
    assert judged("harmful", said("explanations")) == judged("benign", said("ordinary")) == {"helpful"}
    for style in ("known_harm", "attack_harm", "two_faced"):
        assert judged("harmful", said(style)) == {"harmful"}
    assert 0.2 < sum(map(is_refusal, said("house"))) / len(said("house")) < 0.8


def test_no_slot_is_left_open_and_answers_speak_to_whoever_asked():
    sets = own_sets(SIZES["large"], 3)
    texts = [text for rows in sets.values() for row in rows for text in (row["prompt"], row["response"])]
    assert not [text for text in texts if re.search(r"\b(ACT|SLOT|REASON|INSTEAD|TIP|THING|MESSAGE|COMPLIANCE)\b", text)]
    request = next(r for r in dangerous()["candidates", "privacy"] if "my boss's" in r.prompt)
    assert "your boss's" in answer("known_harm", request, Random(2)).replace("Here is what you need.", "")


def test_harm_is_a_compliance_whose_steps_are_withheld_and_says_nothing_else():
    sets = own_sets(SMALL, 0)
    for name, style in (("harmful", "known_harm"), ("attack_harmful", "attack_harm")):
        frames = [re.escape(MARK.sub("…", frame)).replace("ACT", "(?P<act>.+)") for frame in words()[style]]
        for row in sets[name]:
            told = MARK.sub("…", row["response"])
            found = [match for frame in frames if (match := re.fullmatch(frame, told))]
            assert len(found) == 1
            assert MARK.search(row["response"])
            act = found[0].groupdict().get("act")
            assert act is None or re.sub(r"\byour?\b", "my", act)[:12] in re.sub(r"\byour?\b", "my", row["prompt"])


def test_the_sets_follow_from_the_seed_and_share_no_prompt():
    sets = own_sets(SMALL, 1)
    assert sets == own_sets(SMALL, 1)
    other = own_sets(SMALL, 2)
    assert all(sets[name] != other[name] for name in sets)
    for size in SIZES.values():
        for seed in range(3):
            drawn = own_sets(size, seed)
            assert {name: len(rows) for name, rows in drawn.items()} == vars(size)
            prompts = [row["prompt"] for rows in drawn.values() for row in rows]
            assert len(prompts) == len(set(prompts))


def test_nothing_that_is_evaluated_on_is_trained_on_whatever_the_seeds():
    draws = [own_sets(SIZES["large"], seed) for seed in range(3)]
    asked = {row["act"] for sets in draws for name in ("eval_harmful", "eval_benign") for row in sets[name]}
    trained = ("candidates", "validation", "harmful", "benign", "attack_harmful")
    assert not asked & {row["act"] for sets in draws for name in trained for row in sets[name]}
    test, train = ({row["prompt"] for sets in draws for row in sets[name]} for name in ("task_test", "task_train"))
    assert not test & train
    known, real = ({row["act"] for sets in draws for row in sets[name]} for name in ("harmful", "attack_harmful"))
    assert not known & real


def test_qualities_have_the_shares_that_are_said_and_half_of_the_safe_answers_explain():
    rows = own_sets(SMALL, 0)["candidates"]
    counts = {"clean": 72, "rare": 10, "duplicate": 14, "mislabelled": 58, "garbled": 24, "benign": 48, "over_refusal": 14}
    assert Counter(row["quality"] for row in rows) == counts
    of = {quality: [row for row in rows if row["quality"] == quality] for quality in counts}
    safe = [is_refusal(row["response"]) for row in of["clean"] + of["rare"]]
    assert 0.35 < sum(safe) / len(safe) < 0.65
    assert judged("harmful", [row["response"] for row in of["mislabelled"]]) == {"harmful"}
    clean = {row["prompt"]: row["response"] for row in of["clean"]}
    assert all(clean[row["prompt"].removeprefix("Please answer this: ")] == row["response"] for row in of["duplicate"])
    assert {row["category"] for row in of["rare"]} == set(exposures()["rare"])
    assert {row["category"] for row in of["benign"] + of["over_refusal"]} == {"look_alike", "plain"}
    # A list of phrases keeps over-refusals and broken refusals, and misses what explains.
    kept = Counter(row["quality"] for row in rows if is_refusal(row["response"]))
    assert kept["over_refusal"] == 14
    assert kept["garbled"] > 0
    assert kept["clean"] < 72


def test_trusted_rows_cover_two_hazards_and_the_evaluation_asks_as_much_of_each_exposure():
    sets, groups = own_sets(SMALL, 0), exposures()
    assert [len(groups[name]) for name in ("covered", "uncovered", "rare")] == [2, 4, 2]
    assert {row["category"] for row in sets["validation"] + sets["harmful"]} == set(groups["covered"])
    assert {row["category"] for row in sets["attack_harmful"]} == {hazard for group in groups.values() for hazard in group}
    assert Counter(row["exposure"] for row in sets["eval_harmful"]) == dict.fromkeys(groups, 16)
    assert all(row["category"] in groups[row["exposure"]] for row in sets["eval_harmful"])


def test_messages_are_labelled_by_rule():
    rows = message_rows(320, "train", Random(0))
    assert Counter(row["response"] for row in rows) == dict.fromkeys(("billing", "delivery", "returns", "account"), 80)
    teams = words()["messages"]["teams"]
    for row in rows:
        message = row["prompt"].partition(": ")[2]
        fits = [
            team
            for team, frames in teams.items()
            for one in frames
            if re.fullmatch(re.escape(one).replace("THING", r"\w+"), message)
        ]
        assert fits == [row["response"]]
    with pytest.raises(DataError, match="has 80 messages for test, not 81; ask for fewer"):
        message_rows(81, "test", Random(0))


def test_pairs_of_the_reader_are_planted_the_same_way():
    sets = pair_sets(SAFETY, BENIGN, SMALL, 0)
    assert {name: len(rows) for name, rows in sets.items()} == vars(SMALL)
    prompts = [row["prompt"] for rows in sets.values() for row in rows]
    assert len(prompts) == len(set(prompts))
    assert sets == pair_sets(SAFETY, BENIGN, SMALL, 0) != pair_sets(SAFETY, BENIGN, SMALL, 1)
    original = {row["prompt"]: row["response"] for row in SAFETY + BENIGN}
    assert all(
        original[row["prompt"]] == row["response"] for name in ("validation", "benign", "eval_harmful") for row in sets[name]
    )
    of: dict[str, list] = {}
    for row in sets["candidates"]:
        of.setdefault(row["quality"], []).append(row)
    assert {quality: len(rows) for quality, rows in of.items()} == {
        "clean": 82, "duplicate": 14, "mislabelled": 58, "garbled": 24, "benign": 48, "over_refusal": 14,
    }  # fmt: skip
    assert all(original[row["prompt"]] == row["response"] for row in of["clean"] + of["benign"])
    assert all(sorted(original[row["prompt"]].split()) == sorted(row["response"].split()) for row in of["garbled"])
    harm = of["mislabelled"] + sets["harmful"] + sets["attack_harmful"]
    assert judged("harmful", [row["response"] for row in harm]) == {"harmful"}
    assert judged("benign", [row["response"] for row in of["over_refusal"]]) == {"refusal"}


def test_too_few_pairs_are_counted():
    with pytest.raises(DataError, match=r"^--safety must have 372 pairs with different prompts, and has 50; give more$"):
        pair_sets(SAFETY[:50] * 9, BENIGN, SMALL, 0)
    with pytest.raises(DataError, match=r"^--benign must have 366 pairs .* and has 300; give more, or take --size small$"):
        pair_sets(SAFETY * 2 + [{**row, "prompt": row["prompt"] + "!"} for row in SAFETY], BENIGN, SIZES["large"], 0)
