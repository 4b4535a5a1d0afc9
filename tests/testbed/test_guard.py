from __future__ import annotations

import json
from pathlib import Path

import pytest

from pharmacist_ray.models.classifier import harm, load_classifier, text_ids
from pharmacist_ray.testbed import guard
from pharmacist_ray.testbed.guard import TEMPLATE, make_guard
from pharmacist_ray.testbed.tiny import tiny_llama, word_tokenizer
from pharmacist_ray.testbed.world import HAZARDS, KINDS, World

WORLD = World(3, 3)


def test_half_of_a_guards_rows_are_unsafe_and_none_is_anybodys_fine_tune(tmp_path: Path) -> None:
    safe, unsafe = WORLD.moderation(120)
    assert (len(safe), len(unsafe)) == (60, 60)
    assert {row["category"] for row in unsafe} & set(KINDS) == set()
    assert any(row.get("category") in HAZARDS for row in safe)  # refusals of the same requests
    WORLD.write_jsonl(tmp_path)
    mine = {row["prompt"] for row in safe + unsafe}
    for name in ("attack_harmful", "harmful", "validation", "eval_harmful", "eval_benign", "classification_test"):
        assert not mine & {json.loads(line)["prompt"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()}, name


def test_a_guard_learns_to_tell_compliance_from_refusal_is_kept_and_is_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "STEPS", 40)
    tokenizer = word_tokenizer(WORLD.vocabulary())
    tiny_llama(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    make_guard(tmp_path / "base", WORLD, tmp_path / "guard")
    weights = (tmp_path / "guard" / "model.safetensors").read_bytes()
    make_guard(tmp_path / "base", WORLD, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
    monkeypatch.setattr(guard, "AutoTokenizer", None)  # whoever trains it again fails
    make_guard(tmp_path / "base", WORLD, tmp_path / "guard")
    moderator, words = load_classifier(str(tmp_path / "guard"), "guard")
    safe, unsafe = WORLD.moderation(200)
    texts = [TEMPLATE.format(prompt=row["prompt"], answer=row["response"]) for row in safe + unsafe]
    found = harm(moderator, [text_ids(words, text, 64) for text in texts], [1]) > 0.5
    assert int(found[100:].sum() + (~found[:100]).sum()) > 150
