"""The page on other trainers, word by word: from a hub-style folder in each layout to a step of TRL, in Python and on the command line."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml

from pharmacist_ray.api import configure
from pharmacist_ray.cli.app import app
from pharmacist_ray.data.schema import Row
from tests.families import FAMILIES, like

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "trainers.md"
TRAIN = {"steps": 2, "batch_size": 4, "lr": 1e-2}
HERE: dict[str, Any] = {
    "model.max_length": 64, "model.lora": {"r": 2}, "resources.workers": 0, "resources.actors": 0, "data.shards": 2,
    "scoring.random_draws": 1, "selector": {"warmup": TRAIN, "checkpoints": [2], "batch_size": 4, "reference": None},
    "scoring.scorers": ["pharmacist", "random"],
}  # fmt: skip
SMALL = "max_steps=1, per_device_train_batch_size=4, max_length=64, report_to='none', use_cpu=True, bf16=False"


def turns(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


LAYOUTS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "prompt_response": lambda prompt, answer: {"prompt": prompt, "response": answer},
    "instruction": lambda prompt, answer: {"instruction": prompt, "input": "", "output": answer},
    "messages": lambda prompt, answer: {"messages": turns(prompt, answer)},
    "prompt_completion": lambda prompt, answer: {"prompt": turns(prompt, answer)[:1], "completion": turns(prompt, answer)[1:]},
    "sharegpt": lambda prompt, answer: {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]},
    "preference": lambda prompt, answer: {"prompt": prompt, "chosen": answer, "rejected": prompt},
}
"""How one question and its answer stand in each."""


@pytest.fixture
def place(
    layout: str,
    rows_of: Callable[..., list[Row]],
    family_folder: Callable[[str], Path],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Return the working directory of the page's reader."""
    shutil.copytree(family_folder("SmolLM2"), tmp_path / "model")
    like(tokenizer, FAMILIES["SmolLM2"].template).save_pretrained(tmp_path / "model")
    rows = rows_of(24, seed=1)
    (tmp_path / "data" / "my-set" / "data").mkdir(parents=True)
    (tmp_path / "data" / "my-set" / "README.md").write_text("---\nlicense: mit\n---\n")
    made = datasets.Dataset.from_list([LAYOUTS[layout](row.prompt, row.response) for row in rows])
    made.to_parquet(str(tmp_path / "data" / "my-set" / "data" / "train-00000-of-00001.parquet"))
    for seed, name in enumerate(("trusted", "harmful"), 2):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(f"{row.raw}\n" for row in rows_of(6, seed=seed)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(code: str, place: Path) -> Any:
    """Run a block of the page, on the reader's model, with TRL's settings made small; return the trainer."""
    code = code.replace('"my/model"', repr(str(place / "model"))).replace(
        'output_dir="trained"', f'output_dir="trained", {SMALL}'
    )
    last = code.rstrip().splitlines()[-1]
    assert last.endswith(".train()")
    code = code.replace(last, f"trainer = {last.removesuffix('.train()')}\nresult = trainer.train()")
    found: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), found)
    return found


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    "layout", [name if name == "sharegpt" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_a_folder_in_any_layout_becomes_a_step_of_trl(layout, place, monkeypatch):
    pytest.importorskip("trl")
    text = PAGE.read_text()
    in_python, by_command, weighted = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    monkeypatch.setattr(
        "pharmacist_ray.api.configure", lambda config, settings=None: configure(config, HERE | dict(settings or {}))
    )
    found = run(in_python, place)
    assert found["result"].training_loss > 0
    assert len(found["rows"]) == len(found["curated"].rows) == 10  # 0.4 of 24
    assert set(LAYOUTS[layout]("", "")) < set(found["curated"].rows.column_names)

    values = {"run_dir": "runs/first", "model": {"path": str(place / "model")}, "data": {}}
    values["data"] = {name: {"path": f"data/{name}.jsonl"} for name in ("candidates", "validation", "harmful")}
    values["data"]["validation"]["path"] = "data/trusted.jsonl"
    Path("pharmacist.yaml").write_text(yaml.safe_dump(values))
    [command] = [line for line in text.splitlines() if line.startswith("pharmacist select")]
    small = [f"{key}={json.dumps(value)}" for key, value in HERE.items()]
    words = [*shlex.split(command)[1:], "data.candidates.path=data/my-set", "selection.ratio=0.4", *small]
    for stage in ("ingest", "fit", "score", "select"):
        app([stage, *words[1:]], standalone_mode=False)
    assert run(by_command, place)["result"].training_loss > 0
    found = run(weighted, place)
    assert found["result"].training_loss > 0
    trainer, kept = found["trainer"], found["rows"]
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(3)])
    assert batch["weight"].tolist() == pytest.approx(kept["weight"][:3])
    assert len(set(kept["weight"])) == len(kept)
    with torch.no_grad():
        whole = float(trainer.compute_loss(trainer.model, dict(batch)))
        each = []
        for number in range(3):
            one = {name: tensor[number : number + 1] for name, tensor in batch.items()}
            each.append(float(one["weight"]) * float(trainer.model(**{k: v for k, v in one.items() if k != "weight"}).loss))
    assert whole == pytest.approx(sum(each) / 3, rel=1e-4)
