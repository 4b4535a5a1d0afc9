"""Public sets of prompts by name, from local folders with placeholder rows in each set's layout."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from pharmacist_ray.config.data import DataConfig, PromptsConfig, RowsConfig
from pharmacist_ray.config.public_sets import PROMPT_SETS, PUBLIC_SETS, ROW_SETS
from pharmacist_ray.data.public_sets import stage_public_set
from pharmacist_ray.errors import DataError

ASKED = [f"placeholder {number}" for number in range(3)]
LAYOUTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "beavertails": lambda prompt: {"prompt": prompt, "category": "a", "category_id": 3},
    "do-not-answer": lambda prompt: {
        "id": 1, "risk_area": "x", "types_of_harm": "a", "specific_harms": "y", "question": prompt, "GPT4_response": "never taken",
    },
    "harmbench": lambda prompt: {"prompt": prompt, "category": "a"},
    "strongreject": lambda prompt: {"prompt": prompt, "category": "a", "source": "x"},
    "sorry-bench": lambda prompt: {"question_id": 1, "category": "a", "turns": [prompt], "prompt_style": "base"},
    "xstest-unsafe": lambda prompt: {"id": 1, "prompt": prompt, "type": "a", "label": "unsafe", "focus": "x", "note": "y"},
    "xstest-safe": lambda prompt: {"id": 1, "prompt": prompt, "type": "a", "label": "safe", "focus": "x", "note": "y"},
    "or-bench": lambda prompt: {"prompt": prompt, "category": "a"},
    "or-bench-hard": lambda prompt: {"prompt": prompt, "category": "a"},
    "or-bench-toxic": lambda prompt: {"prompt": prompt, "category": "a"},
    "beavertails-safe": lambda prompt: {"prompt": prompt, "response": "so", "category": {"x": False}, "is_safe": True},
    "beavertails-unsafe": lambda prompt: {"prompt": prompt, "response": "so", "category": {"x": True}, "is_safe": False},
    "dolly": lambda prompt: {"instruction": prompt, "context": "", "response": "so", "category": "a"},
}  # fmt: skip
"""Set → one of its rows."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def copy_of_the_hub(folder: Path, name: str) -> Path:
    """Write a set as the hub's repository has it: the wanted rows, and others in its other configurations, splits and styles."""
    chosen, rows = PUBLIC_SETS[name], [LAYOUTS[name](prompt) for prompt in ASKED]
    if chosen.only:
        another = not chosen.only[1] if isinstance(chosen.only[1], bool) else "another"
        rows.insert(1, LAYOUTS[name]("not meant") | {chosen.only[0]: another})
    folder.mkdir()
    (folder / "wanted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "other.jsonl").write_text(json.dumps(LAYOUTS[name]("not meant")) + "\n")
    own = {"config_name": chosen.configuration or "default", "data_files": [{"split": chosen.split, "path": "wanted.jsonl"}]}
    if chosen.configuration:
        configs = [{"config_name": "another", "data_files": "other.jsonl"}, own]
    else:
        own["data_files"].append({"split": "others", "path": "other.jsonl"})
        configs = [own]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    return folder


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_a_set_is_taken_from_a_copy_of_the_hubs_folder(name: str, tmp_path: Path) -> None:
    folder = copy_of_the_hub(tmp_path / "set", name)
    split = PromptsConfig.model_validate({"name": name}).split
    staged = stage_public_set(name, str(folder), split, tmp_path / "rows.parquet")
    assert pq.read_table(staged).to_pylist() == [{"prompt": prompt, "category": "a"} for prompt in ASKED]


@pytest.mark.parametrize("name", ROW_SETS)
def test_a_set_of_rows_comes_with_its_answers(name: str, tmp_path: Path) -> None:
    folder = copy_of_the_hub(tmp_path / "set", name)
    staged = stage_public_set(name, str(folder), RowsConfig.model_validate({"name": name}).split, tmp_path / "rows.parquet")
    category = {"category": "a"} if name == "dolly" else {}
    assert pq.read_table(staged).to_pylist() == [{"prompt": prompt, "response": "so", **category} for prompt in ASKED]
    (tmp_path / "empty.jsonl").write_text('{"prompt": "placeholder"}\n')
    with pytest.raises(DataError, match=rf"^set of rows '{name}': .* has no column"):
        stage_public_set(name, str(tmp_path / "empty.jsonl"), "train", tmp_path / "rows.parquet")


def test_a_set_of_rows_stands_only_for_what_it_is() -> None:
    path = {"path": "x.jsonl"}
    data = DataConfig.model_validate({"candidates": path, "validation": {"name": "beavertails-safe"}, "harmful": path})
    assert data.validation.path == ["hf:PKU-Alignment/BeaverTails"]
    assert data.validation.split == "30k_train"
    for wrong, message in (
        (
            {"harmful": {"name": "dolly"}},
            "harmful takes harmful rows and 'dolly' has ordinary ones; of the public sets: beavertails-unsafe",
        ),
        (
            {"benign": {"name": "dolyl"}},
            "unknown set of rows 'dolyl' .did you mean 'dolly'.*; of your own rows give the path alone",
        ),
        ({"benign": {"name": "harmbench"}}, "unknown set of rows 'harmbench'"),
        ({"benign": {}}, "rows need a path, or the name of a public set: beavertails-safe, beavertails-unsafe, dolly"),
        (
            {"benign": {"name": "dolly", "columns": {"prompt": "x"}}},
            "the columns of set of rows 'dolly' are known; leave columns out",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig.model_validate({"candidates": path, "validation": path, "harmful": path, **wrong})


@pytest.mark.parametrize(
    ("name", "row"),
    [
        (
            "harmbench",
            {"Behavior": "placeholder 0", "FunctionalCategory": "standard", "SemanticCategory": "a", "BehaviorID": "x"},
        ),
        ("strongreject", {"category": "a", "source": "x", "forbidden_prompt": "placeholder 0"}),
    ],
)
def test_a_set_is_taken_from_the_authors_own_file(name: str, row: dict[str, str], tmp_path: Path) -> None:
    with (tmp_path / "set.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    staged = stage_public_set(name, str(tmp_path / "set.csv"), "train", tmp_path / "rows.parquet")
    assert pq.read_table(staged).to_pylist() == [{"prompt": "placeholder 0", "category": "a"}]


def test_a_set_is_taken_from_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    datasets.Dataset.from_list([LAYOUTS["harmbench"](prompt) for prompt in ASKED]).save_to_disk(tmp_path / "saved")
    staged = stage_public_set("harmbench", str(tmp_path / "saved"), "train", tmp_path / "rows.parquet")
    assert pq.read_table(staged)["prompt"].to_pylist() == ASKED


def test_what_is_not_there_or_not_the_set_is_said(tmp_path: Path) -> None:
    def stage(name: str, path: object) -> str:
        with pytest.raises(DataError) as caught:
            stage_public_set(name, str(path), "train", tmp_path / "rows.parquet")
        return str(caught.value)

    assert stage("harmbench", tmp_path / "none").startswith(
        f"prompt set 'harmbench': no such folder: {tmp_path / 'none'}; where the"
    )
    (tmp_path / "mine.jsonl").write_text('{"text": "placeholder", "label": "safe", "category": "a", "type": "b"}\n')
    assert stage("harmbench", tmp_path / "mine.jsonl") == (
        f"prompt set 'harmbench': {tmp_path / 'mine.jsonl'} has no column prompt or Behavior; it has text, label, category, type"
    )
    (tmp_path / "mine.txt").write_text("placeholder")
    assert "of a type that is not known here; known: .csv, .json, .jsonl, .parquet" in stage("harmbench", tmp_path / "mine.txt")
    (tmp_path / "safe.jsonl").write_text('{"prompt": "placeholder", "label": "safe", "type": "b"}\n')
    assert stage("xstest-unsafe", tmp_path / "safe.jsonl") == (
        f"prompt set 'xstest-unsafe': no row in {tmp_path / 'safe.jsonl'} has label=unsafe"
    )


def test_a_hub_out_of_reach_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        stage_public_set("sorry-bench", PROMPT_SETS["sorry-bench"].path, "train", tmp_path / "rows.parquet")
    message = str(caught.value)
    assert message.startswith(
        "prompt set 'sorry-bench': cannot load the Hugging Face data set 'hf:sorry-bench/sorry-bench-202503'"
    )
    assert message.endswith(
        "; sorry-bench/sorry-bench-202503 lets in only whom its authors allow; where the hub is out of reach, name a folder that has "
        "the set with path"
    )
