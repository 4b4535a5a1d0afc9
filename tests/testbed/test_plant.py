from __future__ import annotations

import inspect
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from pharmacist_ray.cli.app import app, main
from pharmacist_ray.errors import ConfigError, DataError
from pharmacist_ray.testbed import make
from pharmacist_ray.testbed.plant import CANDIDATES, TRUSTED, plant, write_jsonl

SAFETY = [{"prompt": f"safety {i}", "response": f"no {i} a b c d e f g h"} for i in range(400)]
BENIGN = [{"prompt": f"benign {i}", "response": f"yes {i}"} for i in range(200)]


def test_shares_and_meaning_of_the_qualities() -> None:
    sets = plant(SAFETY, BENIGN, seed=1, candidates=200, trusted=40)
    rows = sets["candidates"]
    assert Counter(row["quality"] for row in rows) == {"clean": 100, "swapped": 40, "benign": 40, "shuffled": 20}
    answer = {row["prompt"]: row["response"] for row in SAFETY + BENIGN}
    for row in rows:
        original = answer[row["prompt"]]
        assert (row["response"] == original) == (row["quality"] in ("clean", "benign"))
        assert row["prompt"].startswith("benign" if row["quality"] == "benign" else "safety")
        if row["quality"] == "shuffled":
            assert sorted(row["response"].split()) == sorted(original.split())
    assert all(row["response"].startswith("yes") for row in sets["harmful"])
    assert all(answer[row["prompt"]] == row["response"] for row in sets["validation"] + sets["benign"])


def test_sets_share_no_prompt_and_depend_on_the_seed_alone() -> None:
    sets = plant(SAFETY, BENIGN, seed=1, candidates=200, trusted=40)
    used = [row["prompt"] for rows in sets.values() for row in rows]
    assert len(used) == len(set(used)) == 200 + 3 * 40
    assert sets == plant(SAFETY, BENIGN, seed=1, candidates=200, trusted=40)
    assert sets != plant(SAFETY, BENIGN, seed=2, candidates=200, trusted=40)


def test_repeated_prompts_and_empty_answers_are_left_out() -> None:
    rows = plant([*SAFETY, *SAFETY, {"prompt": "x", "response": " "}], BENIGN, candidates=200, trusted=40)["candidates"]
    assert len({row["prompt"] for row in rows}) == 200
    assert all(row["response"].strip() for row in rows)


def test_errors() -> None:
    with pytest.raises(DataError, match="needs 720 distinct safety pairs, but there are 400"):
        plant(SAFETY, BENIGN, candidates=800, trusted=40)
    with pytest.raises(DataError, match="give more pairs"):
        plant(SAFETY[:2], BENIGN)
    with pytest.raises(ConfigError, match="must name only clean, swapped, benign, shuffled"):
        plant(SAFETY, BENIGN, shares={"clean": 0.5, "bad": 0.5})


def test_write_jsonl(tmp_path: Path) -> None:
    sets = plant(SAFETY, BENIGN, candidates=200, trusted=40)
    assert [path.name for path in write_jsonl(sets, tmp_path / "new")] == [f"{name}.jsonl" for name in sets]
    assert len((tmp_path / "new" / "candidates.jsonl").read_text().splitlines()) == 200


@pytest.mark.parametrize(("safety", "benign"), [(400, 200), (400, 30), (12, 200)])
def test_the_advice_of_the_command_works_and_one_more_would_be_too_many(safety, benign, tmp_path, monkeypatch, capsys):
    trained: list[bool] = []
    monkeypatch.setattr(make, "_pretrain", lambda *_, **__: trained.append(True))
    for name, rows in (("safety", SAFETY[:safety]), ("benign", BENIGN[:benign])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(*options: str) -> int:
        files = [str(tmp_path / name) for name in ("safety.jsonl", "benign.jsonl", "out")]
        monkeypatch.setattr(sys, "argv", ["pharmacist", "plant", *files, *options])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    assert call() == DataError.exit_code
    advice = re.search(r"lower the numbers, for example (--candidates \d+ --trusted \d+)\n", capsys.readouterr().err)
    assert advice
    _, candidates, _, trusted = options = advice[1].split()
    assert (call(*options), trained) == (0, [True])
    assert len((tmp_path / "out" / "data" / "candidates.jsonl").read_text().splitlines()) == int(candidates)
    assert len((tmp_path / "out" / "data" / "validation.jsonl").read_text().splitlines()) == int(trusted)
    assert call("--candidates", str(int(candidates) + 5), "--trusted", str(int(trusted) + 1)) == DataError.exit_code


def test_the_commands_defaults_are_the_functions():
    command = next(one.callback for one in app.registered_commands if one.callback and one.callback.__name__ == "plant")
    defaults = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    assert (defaults["candidates"], defaults["trusted"]) == (CANDIDATES, TRUSTED)
