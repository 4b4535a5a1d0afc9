from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from pharmacist_ray.errors import ConfigError, DataError
from pharmacist_ray.evaluation.judges.testbed import build
from pharmacist_ray.testbed.language import HAZARDS, KINDS, RARE_HAZARDS, TASKS
from pharmacist_ray.testbed.world import GOOD, MIX, World


def prompts(rows: list[dict[str, str]]) -> set[str]:
    return {row["prompt"].removeprefix("please ") for row in rows}


def all_sets(world: World) -> dict[str, list[dict[str, str]]]:
    return {
        "alignment": world.alignment(1000),
        "validation": world.validation(200),
        "harmful": world.harmful(200),
        "benign": world.benign(350),
        "attack_harmful": world.attack_harmful(100),
        "eval_harmful": world.eval_harmful(100),
        "eval_benign": world.eval_benign(60),
    }


def test_same_seed_same_rows_and_other_seed_other_rows_of_the_same_language() -> None:
    assert all_sets(World(3)) == all_sets(World(3))
    assert World(3).alignment(200) != World(4).alignment(200)
    assert World(3).describe() == World(4).describe()
    assert World(3).pretraining(50) == World(4).pretraining(50)
    assert World(3, world_seed=1).objects != World(3).objects


def test_data_sets_share_no_prompt_even_across_seeds() -> None:
    first, second = all_sets(World(1)), all_sets(World(2))
    for a, b in itertools.combinations(first, 2):
        assert not prompts(first[a]) & prompts(first[b]), (a, b)
        assert not prompts(first[a]) & prompts(second[b]), (a, b)


def test_evaluation_prompts_are_never_trained_on_and_their_objects_are_held_out() -> None:
    world = World(0)
    sets = all_sets(world)
    evaluated = prompts(sets["eval_harmful"]) | prompts(sets["eval_benign"])
    pretrained = {row["prompt"].removeprefix("decline : ") for row in world.pretraining(12_000)}
    assert not evaluated & pretrained

    def objects(rows: list[dict[str, str]]) -> set[str]:
        return {word for row in rows for word in row["prompt"].split() if word in world.objects}

    held_out = objects(sets["eval_harmful"] + sets["eval_benign"])
    assert held_out
    assert not held_out & objects([row for row in sets["alignment"] if row["quality"] != "benign"])
    assert not held_out & objects(sets["validation"] + sets["harmful"] + sets["attack_harmful"] + sets["benign"])


def test_harmful_pairs_comply_with_the_dangerous_candidates_and_with_nothing_that_attacks_or_evaluates() -> None:
    world = World(3)
    candidates, pairs = world.alignment(1000), world.harmful_pairs(1000)
    hazards = {*HAZARDS, *RARE_HAZARDS}
    dangerous = [row["prompt"] for row in candidates if row["quality"] in {*GOOD, "mislabelled", "garbled"}]
    assert [row["prompt"] for row in pairs] == dangerous == [row["prompt"] for row in candidates if row["category"] in hazards]
    sets = all_sets(world) | {"other": World(4).attack_harmful(100)}
    unseen = set().union(*(prompts(sets[name]) for name in sets if name not in ("alignment", "validation", "benign")))
    unseen |= prompts(World(4).eval_harmful(100))
    assert not prompts(pairs) & unseen
    judge = build(world.describe())
    assert {judge(row["prompt"], row["response"]) for row in pairs} == {"harmful"}
    assert {row["category"] for row in pairs} == hazards


def test_harmful_pairs_are_a_function_of_the_seed() -> None:
    assert World(3).harmful_pairs(200) == World(3).harmful_pairs(200)
    assert World(3).harmful_pairs(200) != World(4).harmful_pairs(200)
    assert {row["prompt"] for row in World(3).harmful_pairs(200)} <= {row["prompt"] for row in World(3).alignment(200)}


def test_planted_qualities_have_their_shares_and_mean_what_they_say() -> None:
    world = World(5)
    judge = build(world.describe())
    rows = world.alignment(1000)
    assert Counter(row["quality"] for row in rows) == {quality: round(1000 * share) for quality, share in MIX.items()}
    verdicts = {quality: {judge(row["prompt"], row["response"]) for row in rows if row["quality"] == quality} for quality in MIX}
    assert all(verdicts[quality] == {"refusal"} for quality in (*GOOD, "over_refusal"))
    assert verdicts["mislabelled"] == {"harmful"}
    assert verdicts["garbled"] == {"incoherent"}
    assert "helpful" in verdicts["benign"]
    assert not verdicts["benign"] & {"harmful", "refusal"}
    category = {quality: {row["category"] for row in rows if row["quality"] == quality} for quality in MIX}
    assert category["rare"] <= set(RARE_HAZARDS)
    assert category["clean"] <= set(HAZARDS)
    assert category["over_refusal"] <= set(KINDS)
    originals = {(row["prompt"], row["response"]) for row in rows if row["quality"] == "clean"}
    assert all((r["prompt"].removeprefix("please "), r["response"]) in originals for r in rows if r["quality"] == "duplicate")


def test_neither_a_refusal_word_nor_the_length_tells_good_rows() -> None:
    rows = World(0).alignment(1000)
    with_word = [row for row in rows if {"refuse", "help", "sorry", "dangerous", "safe"} & set(row["response"].split())]
    assert sum(row["quality"] in GOOD for row in with_word) / len(with_word) < 0.65
    rows.sort(key=lambda row: len(row["response"].split()))
    for end in (rows[:400], rows[-400:]):
        assert sum(row["quality"] in GOOD for row in end) / 400 < 0.55


def test_every_word_is_in_the_vocabulary_and_no_word_has_two_meanings() -> None:
    world = World(0)
    rows = [*itertools.chain.from_iterable(all_sets(world).values()), *world.pretraining(2000)]
    rows += [row for name in TASKS for split in ("train", "test") for row in world.task(name, 60, split)]
    used = {word for row in rows for word in f"{row['prompt']} {row['response']}".split()}
    assert used <= set(world.vocabulary())
    invented = [*world.objects, *itertools.chain.from_iterable(world.parts.values())]
    assert len(invented) == len(set(invented))
    assert not set(invented) & World._fixed_words()


@pytest.mark.parametrize("name", ["classification", "arithmetic"])
def test_task_rows_are_right_and_test_prompts_are_not_trained_on(name: str) -> None:
    train = prompts(World(1).task(name, 120, "train")) | prompts(World(2).task(name, 120, "train"))
    assert not train & prompts(World(1).task(name, 60, "test"))
    sums = World(1).task("arithmetic", 20)
    assert all(int(r["response"].split()[-1]) == sum(map(int, r["prompt"].split()[-2:])) for r in sums)


def test_write_jsonl_writes_every_set_and_a_description_that_builds_the_same_judge(tmp_path: Path) -> None:
    world = World(0)
    paths = world.write_jsonl(tmp_path, {"pretraining": 50, "eval_benign": 0})
    assert {path.name for path in paths} >= {"alignment.jsonl", "validation.jsonl", "classification_test.jsonl", "world.json"}
    assert not (tmp_path / "eval_benign.jsonl").exists()
    assert [json.loads(line) for line in (tmp_path / "harmful.jsonl").open()] == world.harmful(200)
    judge = build(json.loads((tmp_path / "world.json").read_text()))
    assert all(judge(row["prompt"], row["response"]) == "harmful" for row in world.harmful(20))


def test_errors_name_what_is_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown testbed task 'sums'.*arithmetic, classification"):
        World().task("sums", 3)
    with pytest.raises(DataError, match=r"requests for validation .* ask for fewer"):
        World().validation(10_000)
    with pytest.raises(ConfigError, match="did you mean 'harmful'"):
        World().write_jsonl(Path("unused"), {"harmfull": 3})
