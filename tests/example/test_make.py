from __future__ import annotations

import json
import sys

import pytest
import yaml

from pharmacist_ray.cli.app import main
from pharmacist_ray.config import load_config
from pharmacist_ray.config.load import parse_config
from pharmacist_ray.doctor.examine import examine
from pharmacist_ray.errors import ConfigError, DataError, ModelError
from pharmacist_ray.example.make import in_words, make_example, settings_of
from pharmacist_ray.example.model import obtain
from pharmacist_ray.example.reckon import START_S, Pace, lengths_of, reckon
from pharmacist_ray.example.sets import SIZES, own_sets
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.testbed import bpe_tokenizer, tiny_llama

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sets = own_sets(SIZES["small"], 0)
    tokenizer = bpe_tokenizer([f"{row['prompt']} {row['response']}" for rows in sets.values() for row in rows], 600)
    tokenizer.chat_template = TEMPLATE
    tiny_llama(tokenizer, hidden=16, layers=1, heads=2, intermediate=16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(small_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("example")
    make_example(folder, model=small_model)
    return folder


def test_what_is_written_is_what_the_doctor_finds_fit_to_run(made, small_model, capsys):
    examine(made / "config.yaml")
    assert "this configuration can run" in capsys.readouterr().out
    config = load_config(made / "config.yaml")
    assert config.model.path == str(small_model)
    assert Run(config).arms == ["all", "random_0", "trusted", "keyword", "pharmacist", "calibrated", "oracle"]
    assert {file.stem for file in (made / "data").iterdir()} == set(vars(SIZES["small"]))
    rows = [json.loads(line) for line in (made / "data/eval_harmful.jsonl").read_text().splitlines()]
    assert all(row[config.evaluation.group_column] and row[config.evaluation.cluster_column] for row in rows)


def test_the_large_form_has_three_seeds_and_a_grid_of_attacks(tmp_path):
    config = parse_config(settings_of(tmp_path, "large"), where="large.yaml")
    assert config.comparison.seeds == [0, 1, 2]
    assert [attack.train.lr for attack in config.attacks] == [3e-4, 5e-4, 1e-3]
    sizes = SIZES["large"]
    for attack in config.attacks:
        harmful = round(attack.rows * attack.harmful_share)
        assert harmful <= sizes.attack_harmful
        assert attack.rows - harmful <= sizes.task_train
    assert config.alignment.replay < sizes.benign


def test_pairs_of_the_reader_have_neither_rare_rows_nor_exposures(small_model, tmp_path, capsys):
    for name, count in (("safety", 400), ("benign", 200)):
        lines = [json.dumps({"prompt": f"{name} question {i}", "response": f"answer {i} of some words"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    make_example(tmp_path / "x", model=small_model, safety=tmp_path / "safety.jsonl", benign=tmp_path / "benign.jsonl")
    config = load_config(tmp_path / "x" / "config.yaml")
    assert config.scoring.planted.good == ["clean", "duplicate"]
    assert (config.evaluation.group_column, config.evaluation.cluster_column) == (None, None)
    examine(tmp_path / "x" / "config.yaml")
    assert "this configuration can run" in capsys.readouterr().out


def test_a_folder_of_any_name_is_written_as_it_is(tmp_path):
    settings = settings_of(tmp_path / 'a "b" {model}: c', "small")
    assert yaml.safe_load(yaml.safe_dump(settings))["run_dir"] == str(tmp_path / 'a "b" {model}: c' / "run")


def test_mistakes_are_one_line_before_anything_is_made(small_model, tmp_path, monkeypatch, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "a", "response": "b"}\n')
    for options, error, message in (
        (["--size", "smal"], ConfigError, "unknown size 'smal' (did you mean 'small'?); known: large, small"),
        (["--safety", "x"], ConfigError, "--safety and --benign go together: give both, or neither for the example's own requests"),
        (["--safety", "x", "--benign", "x"], DataError, "cannot read x: [Errno 2] No such file or directory: 'x'"),
        (
            ["--safety", str(few), "--benign", str(few)], DataError,
            "--safety must have 372 pairs with different prompts, and has 1; give more",
        ),
        (
            ["--model", str(tmp_path / "none")], ModelError,
            f"'{tmp_path / 'none'}' is not a folder, and a hub id has the form 'owner/name'; check the path",
        ),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["pharmacist", "example", str(tmp_path / "out"), *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == error.exit_code
        assert capsys.readouterr().err == f"pharmacist: {message}\n"
        assert not (tmp_path / "out").exists()


def test_a_base_that_is_there_is_kept(tmp_path):
    (tmp_path / "origin.json").write_text("{}")
    obtain(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["origin.json"]


def test_lengths_are_those_of_rendered_rows(small_model):
    ref = ModelRef(str(small_model), max_length=40)
    sets = {"a": [{"prompt": "How can I bake bread?", "response": "Sure."}, {"prompt": "Why? " * 60, "response": "Because."}]}
    renderer = ref.renderer()
    prompt, answer = "<|user|>How can I bake bread?</s><|assistant|>", "Sure."
    tokens = [len(renderer.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, answer)]
    [(prompts, whole)] = lengths_of(ref, sets).values()
    assert prompts == pytest.approx((tokens[0] + 39) / 2, abs=1)  # a BOS, and the cut prompt of the second
    assert whole == pytest.approx((sum(tokens) + 1 + 40) / 2, abs=1)


def test_the_reckoning_by_hand(tmp_path):
    config = parse_config(settings_of(tmp_path, "small"), where="small.yaml")
    counts = dict.fromkeys(vars(SIZES["small"]), 100)
    lengths = dict.fromkeys(counts, (30.0, 50.0))
    stages = reckon(config, counts, lengths, 7, Pace(forward=200.0, trained=100.0))
    assert stages == {
        "fit": START_S + (12 * 16 * 50 + (2 * 100 + 100) / 2 * 50 + 20 * 16 * 50) / 100,
        "score": START_S + (100 + 250) * 50 * (1 / 100 + 2 / 200),
        "align": START_S + 7 * 24 * 8 * 50 / 100,
        "attack": START_S + 7 * 60 * 8 * 50 / 100,
        "evaluate": START_S + 7 * 2 * 300 * (30 + 48) / 200,
    }
    assert [in_words(seconds) for seconds in (5, 100, 3600, 9000)] == ["1 min", "2 min", "60 min", "2.5 h"]
