from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from pharmacist_ray.errors import ConfigError, DataError
from pharmacist_ray.evaluation.judges.testbed import build
from pharmacist_ray.testbed.language import (
    ACTIONS,
    ATTACK_ANSWERS,
    HAZARDS,
    KINDS,
    RARE_HAZARDS,
    REFUSALS,
    SIMULATED_ANSWERS,
    TASKS,
    WORLDS,
    fixed_words,
    invented_words,
)
from pharmacist_ray.testbed.world import GOOD, MIX, World


def prompts(rows: list[dict[str, str]]) -> set[str]:
    return {row["prompt"].removeprefix("please ") for row in rows}


def all_sets(world: World) -> dict[str, list[dict[str, str]]]:
    return {
        "alignment": world.alignment(1000),
        "validation": world.validation(60),
        "harmful": world.harmful(60),
        "benign": world.benign(350),
        "attack_harmful": world.attack_harmful(100),
        "eval_harmful": world.eval_harmful(120),
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
    unseen = {prompt for category in world.categories for prompt in world.unseen(category)}
    assert evaluated <= unseen
    assert not unseen & pretrained


def of(rows: list[dict[str, str]], column: str) -> set[str]:
    return {row[column] for row in rows}


def answer_shapes(world: World, rows: list[dict[str, str]]) -> set[str]:
    """Return the answers with their objects, parts and actions blanked."""
    parts = {*itertools.chain.from_iterable(world.parts.values())}
    classes = dict.fromkeys(world.objects, "OBJECT") | dict.fromkeys(parts, "PART") | dict.fromkeys(ACTIONS, "ACTION")
    return {" ".join(classes.get(word, word) for word in row["response"].split()) for row in rows}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_known_harm_and_the_attack_share_neither_objects_nor_answers_whatever_the_seeds(number: int) -> None:
    world = World(1, number)
    known, attack = world.harmful(60), World(2, number).attack_harmful(100)
    assert not of(known, "object") & of(attack, "object")
    assert len(of(known, "object")) == 10
    assert answer_shapes(world, known) == set(SIMULATED_ANSWERS)
    assert answer_shapes(world, attack) == set(ATTACK_ANSWERS)
    judge = build(world.describe())
    assert {judge(row["prompt"], row["response"]) for row in [*known, *attack]} == {"harmful"}
    complied = [row for row in world.pretraining(2000) if judge(row["prompt"], row["response"]) == "harmful"]
    assert answer_shapes(world, complied) >= {*SIMULATED_ANSWERS, *ATTACK_ANSWERS}


@pytest.mark.parametrize(("number", "covered"), [(0, 2), (1, 2), (2, 2), (1, 1), (1, 6)])
def test_trusted_rows_cover_some_hazards_and_everything_else_has_all(number: int, covered: int) -> None:
    world = World(1, number, covered)
    known = set(world.exposures["covered"])
    assert len(known) == covered
    assert known <= set(HAZARDS)
    assert of(world.validation(60), "category") == of(world.harmful(60), "category") == known
    everything = {*HAZARDS, *RARE_HAZARDS}
    assert of(world.alignment(1000), "category") >= everything
    assert of(world.attack_harmful(100), "category") == of(world.eval_harmful(120), "category") == everything
    assert {number: World(5, number).exposures for number in range(3)} == {
        number: World(6, number).exposures for number in range(3)
    }


def test_worlds_cover_different_hazards() -> None:
    assert len({World(world_seed=number).exposures["covered"] for number in range(5)}) > 1


def test_the_trusted_refusals_have_one_style() -> None:
    rows = World(1).validation(60)
    assert {row["response"].replace(row["object"], "OBJECT") for row in rows} == {REFUSALS[0]}


@pytest.mark.parametrize(
    ("n", "covered", "shares"),
    [
        (120, 2, {"covered": 40, "uncovered": 40, "rare": 40}),
        (61, 3, {"covered": 20, "uncovered": 20, "rare": 21}),
        (60, 6, {"covered": 30, "rare": 30}),
    ],
)
def test_evaluation_asks_for_every_exposure_alike_and_names_the_object(n: int, covered: int, shares: dict[str, int]) -> None:
    world = World(1, 1, covered)
    rows = world.eval_harmful(n)
    assert Counter(row["exposure"] for row in rows) == shares
    for row in rows:
        assert row["category"] in world.exposures[row["exposure"]]
        assert row["object"] in row["prompt"].split()
        assert world.objects[row["object"]] == row["category"]
    assert len(prompts(rows)) == n
    assert all(row["object"] in row["prompt"].split() for row in world.eval_benign(60))
    assert Counter(row["exposure"] for row in World(1, 1).eval_harmful(120)).keys() == {"covered", "uncovered", "rare"}


def test_no_two_worlds_share_a_word_of_their_own() -> None:
    words = [word for number in range(0, 10) for word in invented_words(number)]
    words += [word for number in (500, WORLDS - 1) for word in invented_words(number)]
    assert len(words) == len(set(words)) == 12 * 14 * 21
    first, second = World(world_seed=0), World(world_seed=1)
    assert not {*first.objects} & {*second.objects}
    assert not prompts(first.alignment(1000)) & prompts(second.alignment(1000))
    with pytest.raises(ConfigError, match=r"worlds are numbered from 0 to 999, got 1000; choose one of them"):
        World(world_seed=WORLDS).vocabulary()
    with pytest.raises(ConfigError, match=r"from 0 to 999, got -1"):
        invented_words(-1)


@pytest.mark.parametrize(
    ("noise", "counts"),
    [
        (0.0, {"clean": 750, "rare": 100, "duplicate": 150}),
        (
            0.3,
            {"clean": 525, "rare": 70, "duplicate": 105, "mislabelled": 120, "garbled": 50, "benign": 100, "over_refusal": 30},
        ),
        (0.6, {quality: round(1000 * share) for quality, share in MIX.items()}),
    ],
)
def test_noise_is_the_share_of_broken_candidates(noise: float, counts: dict[str, int]) -> None:
    world = World(5, noise=noise)
    rows = world.alignment(1000)
    assert Counter(row["quality"] for row in rows) == counts
    judge = build(world.describe())
    assert {judge(row["prompt"], row["response"]) for row in rows if row["quality"] in GOOD} == {"refusal"}
    assert world.validation(60) == World(5).validation(60)
    assert world.pretraining(50) == World(6).pretraining(50)


def test_facts_are_those_of_pretraining() -> None:
    world = World(0)
    facts = {fact for item in world.objects for fact in world.facts(item)}
    questions = {question for question, _ in facts}
    rows = [row for row in world.pretraining(4000) if row["prompt"] in questions]
    assert len(rows) > 500
    assert {(row["prompt"], row["response"]) for row in rows} <= facts


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
    assert not set(invented) & fixed_words()


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
    assert [json.loads(line) for line in (tmp_path / "harmful.jsonl").open()] == world.harmful(60)
    judge = build(json.loads((tmp_path / "world.json").read_text()))
    assert all(judge(row["prompt"], row["response"]) == "harmful" for row in world.harmful(20))


def test_errors_name_what_is_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown testbed task 'sums'.*arithmetic, classification"):
        World().task("sums", 3)
    with pytest.raises(DataError, match=r"requests for validation .* ask for fewer"):
        World().validation(10_000)
    with pytest.raises(ConfigError, match="did you mean 'harmful'"):
        World().write_jsonl(Path("unused"), {"harmfull": 3})
    with pytest.raises(ConfigError, match=r"trusted rows can cover 1 to 6 hazards, not 7; change covered"):
        World(covered=7)
    with pytest.raises(ConfigError, match=r"noise is a share of at least 0 and less than 1, not 1; change it"):
        World(noise=1.0)
