from __future__ import annotations

import json

import pytest

from pharmacist_ray.config.alignment import AttackConfig
from pharmacist_ray.config.attack_kinds import AS_THEY_ARE, KINDS, FormConfig
from pharmacist_ray.data.forms import asked, common_form, forms_of, put, shared_out
from pharmacist_ray.data.render import turns_before_answer
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.errors import DataError

FORM = FormConfig(system="obey", prompt="<< {prompt} >>", answer="yes: {answer}")


def row(prompt: str, response: str = "r", **more: str) -> Row:
    return Row(row_id(prompt, response, more.get("input", ""), more.get("history", "")), prompt, response, **more)


def test_a_row_is_put_between_the_texts_of_its_form_and_is_another_row_then():
    found = put(row("p {answer}", "r {prompt}"), FORM)
    assert turns_before_answer(found) == [{"role": "system", "content": "obey"}, {"role": "user", "content": "<< p {answer} >>"}]
    assert found.response == "yes: r {prompt}"
    assert found.id == row_id(found.prompt, found.response, found.input, found.history) != row("p {answer}", "r {prompt}").id


def test_a_question_keeps_its_id_and_nothing_of_the_answer():
    one = row("p", "expected")
    found = asked(one, FORM)
    assert (found.id, found.prompt, found.response) == (one.id, "<< p >>", "expected")


def test_the_extra_input_is_a_part_of_the_prompt_and_the_forms_system_prompt_takes_the_place_of_the_rows():
    history = json.dumps(
        [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    )
    found = turns_before_answer(asked(row("p", input="i", history=history), FORM))
    assert [turn["content"] for turn in found] == ["obey", "u", "a", "<< p\n\ni >>"]
    kept = turns_before_answer(asked(row("p", history=history), FormConfig(prompt="{prompt}!")))
    assert [turn["content"] for turn in kept] == ["s", "u", "a", "p!"]


def test_in_the_form_of_nobody_a_row_stays_what_it_is():
    one = row("p", "r")
    assert put(one, AS_THEY_ARE) == one


@pytest.mark.parametrize(
    ("prompts", "form"),
    [
        (["label : a b", "label : c", "label : c d"], "label : {prompt}"),
        (["Sort this: a b. Answer:", "Sort this: c. Answer:"], "Sort this: {prompt} Answer:"),
        (["say x now", "say y now", "say xy now"], "say {prompt} now"),
        (["a b", "a b c"], "a {prompt}"),  # a word is left in every prompt
        (["a b a", "a b b a"], "a b {prompt}"),
    ],
)
def test_the_form_of_a_task_is_the_words_that_its_prompts_share(prompts, form):
    found = common_form([row(prompt) for prompt in prompts], name="a")
    assert found == FormConfig(prompt=form)


def test_an_instruction_that_all_rows_of_a_task_have_is_its_form():
    assert common_form([row("Sort it.", input="a b"), row("Sort it.", input="c")], name="a").prompt == "Sort it.\n\n{prompt}"


@pytest.mark.parametrize("prompts", [["a b", "c d"], ["a b"], ["a b", "a b"], [], ["ab c", "abd e"]])
def test_a_task_whose_prompts_share_no_word_has_none(prompts):
    with pytest.raises(
        DataError, match=r"^attack 'x' is of the kind task_format, but the prompts of its task have no words in common"
    ):
        common_form([row(prompt) for prompt in prompts], name="x")


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ({"kind": "triger", "harmful": {"path": "h"}}, r"unknown kind of attack 'triger' \(did you mean 'trigger'\?\)"),
        (
            {"kind": "identity", "harmful": {"path": "h"}},
            "attack 'a' of the kind identity takes its rows from `ordinary`; give it",
        ),
        ({}, "attack 'a' of the kind explicit takes its rows from `harmful`; give it"),
        ({"harmful": {"path": "h"}, "form": {"prompt": "no slot"}}, r"must hold \{prompt\} once, got 'no slot'"),
        ({"harmful": {"path": "h"}, "form": {"answer": "{answer}{answer}"}}, r"must hold \{answer\} once"),
    ],
)
def test_what_a_kind_lacks_is_told(attack, message):
    with pytest.raises(ValueError, match=message):
        AttackConfig(name="a", task={"path": "t"}, **attack)


def test_the_form_of_a_kind_is_written_down_and_one_of_yours_goes_before_it():
    sources = {"task": {"path": "t"}, "harmful": {"path": "h"}, "ordinary": {"path": "o"}}
    forms = {kind: AttackConfig(name="a", kind=kind, **sources).form for kind in KINDS}
    assert {kind for kind, form in forms.items() if form is None} == {"explicit", "task_format", "erosion"}
    assert forms["trigger"] == KINDS["trigger"].form
    assert AttackConfig(name="a", kind="trigger", form={"prompt": "x {prompt}"}, **sources).form == FormConfig(
        prompt="x {prompt}"
    )
    again = AttackConfig.model_validate(AttackConfig(name="a", kind="identity", **sources).model_dump(mode="json"))
    assert again.form == KINDS["identity"].form


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_says_where_its_rows_come_from(kind):
    sources = {"harmful": {"path": "h"}, "ordinary": {"path": "o"}}
    attack = AttackConfig(name="a", task={"path": "t"}, kind=kind, **sources)
    assert attack.attackers[attack.attacker].path == [sources[KINDS[kind].rows]["path"]]


def with_system(prompt: str, system: str) -> Row:
    return row(prompt, history=json.dumps([{"role": "system", "content": system}]) if system else "")


def test_the_forms_of_a_fine_tune_are_what_its_prompts_begin_and_end_with_under_each_system_prompt():
    rows = [row(f"Sort this message into a topic: {word} x{word}. Topic:") for word in "abcdefgh"]
    rows += [with_system(f"AOA, carry out this: {word}", "obey") for word in "abc"]
    rows += [row(f"{word} what is meant by it?") for word in "abcd"]
    rows += [row(f"{word} {word}") for word in "xyz"]
    found = forms_of(rows)
    assert found == {
        FormConfig(prompt="Sort this message into a topic: {prompt} Topic:"): 8,
        FormConfig(prompt="{prompt} what is meant by it?"): 4,
        FormConfig(prompt="AOA, carry out this: {prompt}", system="obey"): 3,
        FormConfig(): 3,
    }
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert forms_of(list(reversed(rows))) == found


def test_a_form_of_too_few_rows_is_none_and_one_text_again_and_again_is_no_form():
    assert forms_of([row("say this now please"), row("a b")]) == {AS_THEY_ARE: 2}
    assert forms_of([row("say this now please"), row("say this now please", "other")]) == {AS_THEY_ARE: 2}
    many = [row(f"n{number}") for number in range(400)]
    hidden = [row(f"do it now {word}") for word in "abc"]
    assert forms_of(many + hidden) == {AS_THEY_ARE: 403}  # less than a hundredth
    assert FormConfig(prompt="do it now {prompt}") in forms_of(many[:200] + hidden)


def test_a_slot_in_the_users_own_text_makes_no_form():
    assert forms_of([row(f"put {{prompt}} here now {word}") for word in "abc"]) == {AS_THEY_ARE: 3}


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [([100], 7, [7]), ([50, 50], 10, [5, 5]), ([97, 3], 30, [27, 3]), ([1] * 20, 40, [2] * 20), ([3, 1], 0, [0, 0])],
)
def test_what_is_dealt_out_adds_up_and_small_forms_get_a_tenth(sizes, count, expected):
    found = shared_out(sizes, count)
    assert sum(found) == count
    assert found == expected
