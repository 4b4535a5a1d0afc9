from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pharmacist_ray.config import Config, load_config
from pharmacist_ray.config.load import apply_override, dump_config, located, parse_config
from pharmacist_ray.config.template import EXAMPLE
from pharmacist_ray.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(EXAMPLE))
    return tmp_path / "run.yaml"


def refused(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "where", "suggestion"),
    [
        ("selection.ratoi=0.3", "selection.ratoi", "ratio"),
        ("selector.reference.stesp=1", "selector.reference.stesp", "steps"),
        ("data.benign.pth=x", "data.benign.pth", "path"),
        ("attacks.0.train.lrr=1", "attacks.0.train.lrr", "lr"),
        ("evaluation.task.source.layuot=auto", "evaluation.task.source.layuot", "layout"),
        ("comparision={}", "comparision", "comparison"),
    ],
)
def test_an_unknown_key_is_named_with_its_dots_and_the_nearest_known(file, override, where, suggestion):
    assert refused(file, override) == f"{file}: unknown key '{where}' (did you mean '{suggestion}'?)"


def test_an_unknown_key_like_none_lists_those_that_are_known_there(file):
    assert refused(file, "comparison.zzz=1").endswith("unknown key 'comparison.zzz'; known here: selections, defences, seeds")


def test_all_problems_come_in_one_message(file):
    message = refused(file, "model.dtype=f16", "resources.workers=-1", "seed=1.5", "foo=1", "data.harmful=null")
    assert "\n" not in message
    for part in (
        "'model.dtype': Input should be 'auto', 'float32' or 'bfloat16', got 'f16'",
        "'resources.workers': Input should be greater than or equal to 0, got -1",
        "'seed': Input should be a valid integer",
        "unknown key 'foo'",
        "'data.harmful': ",
    ):
        assert part in message


def test_a_missing_key_is_named(file):
    values = yaml.safe_load(file.read_text())
    del values["model"]["path"], values["attacks"][0]["task"]
    file.write_text(yaml.safe_dump(values))
    assert refused(file) == f"{file}: 'model.path' is missing; 'attacks.0.task' is missing"


@pytest.mark.parametrize(
    ("override", "where"),
    [("model.lora.targets=5", "model.lora.targets"), ("selection.quotas={safe: 3}", "selection.quotas.safe")],
)
def test_where_a_key_takes_several_types_its_name_is_still_the_users(file, override, where):
    message = refused(file, override)
    assert f"'{where}': " in message
    assert "[" not in message
    assert ".str" not in message


def test_overrides_are_yaml_reach_into_lists_and_leave_the_rest_alone(file):
    config = load_config(
        file,
        [
            "attacks.0.rows=50", "attacks.0.train.lr=1e-3", "selection.ratio=null", "selection.count=7", "scoring.scorers=[random]",
            "selection.scorer=random", "comparison.selections=[all, random]", "comparison.seeds.1=9", "model.lora.r=4",
            "selector.reference=null", "evaluation=null", "data.candidates.path=a=b.jsonl", "data.candidates.columns.prompt=ask",
        ],
    )  # fmt: skip
    assert (config.attacks[0].rows, config.attacks[0].train.lr, config.attacks[0].name) == (50, 1e-3, "p10")
    assert (config.selection.ratio, config.selection.count) == (None, 7)
    assert config.comparison.seeds == [0, 9, 2]
    assert (config.model.lora.r, config.model.lora.alpha) == (4, 16.0)
    assert config.evaluation is None
    assert config.data.candidates.path == ["a=b.jsonl"]
    assert config.data.candidates.columns == {"prompt": "ask"}


def test_a_later_override_wins_and_sections_that_were_absent_are_made():
    values: dict[str, Any] = {"a": [1, {"b": 2}], "none": None}
    for override in ("a.1.b=3", "a.0=[5]", "x.y.z=1", "x.y.z=2", "none.k=v", "empty="):
        apply_override(values, override)
    assert values == {"a": [[5], {"b": 3}], "none": {"k": "v"}, "x": {"y": {"z": 2}}, "empty": None}


def test_an_override_changes_one_section_where_the_file_uses_an_alias(tmp_path):
    values = copy.deepcopy(EXAMPLE)
    shared = {"steps": 40, "lr": 0.01, "batch_size": 8}
    values |= {"selector": {"warmup": shared}, "alignment": {"train": shared}, "attacks": values["attacks"] * 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert "*id001" in (tmp_path / "run.yaml").read_text()
    config = load_config(tmp_path / "run.yaml", ["alignment.train.lr=0.5", "attacks.1.name=other", "attacks.1.task.path=x"])
    assert (config.selector.warmup.lr, config.alignment.train.lr) == (0.01, 0.5)
    assert [attack.name for attack in config.attacks] == ["p10", "other"]
    assert [attack.task.path for attack in config.attacks] == [["data/user_task_train.jsonl"], ["x"]]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("selection.ratio", "override 'selection.ratio' is not of the form dotted.key=value"),
        ("=5", "override '=5' is not of the form dotted.key=value"),
        ("a..b=5", "override 'a..b=5' is not of the form dotted.key=value"),
        ("seed=[1", "override 'seed=[1': the value is not YAML"),
        ("seed=2020-13-45", "the value is not YAML: month must be in 1..12"),
        ("seed=!!python/object/apply:os.getcwd []", "the value is not YAML: could not determine a constructor for the tag"),
        ("attacks.5.rows=1", "override 'attacks.5.rows': 'attacks' is a list of 1; use a number below that, not '5'"),
        ("attacks.1=1", "override 'attacks.1': 'attacks' is a list of 1"),
        ("attacks.p10.rows=1", "'attacks' is a list of 1; use a number below that, not 'p10'"),
        ("attacks.².rows=1", "use a number below that, not '²'"),
        ("attacks.-1.rows=1", "use a number below that, not '-1'"),
        ("run_dir.a=1", "override 'run_dir.a': 'run_dir' is a plain value and has no keys"),
        ("run_dir.a.b=1", "override 'run_dir.a.b': 'run_dir' is a plain value and has no keys"),
    ],
)
def test_a_malformed_override_is_quoted(file, override, message):
    assert message in refused(file, override)


def test_a_file_that_cannot_be_used_is_one_clear_line(tmp_path):
    missing = tmp_path / "none.yaml"
    assert refused(missing) == (
        f"cannot read the configuration {missing}: No such file or directory; `pharmacist init` writes one"
    )
    assert "Is a directory" in refused(tmp_path)
    for text, message in (
        (b"a: [1", "is not YAML"),
        (b"a: 2020-13-45", "is not YAML"),
        (b"[" * 3000, "is not YAML"),
        (b"- 1\n", "must hold keys and values, not list; `pharmacist init` writes an example"),
        (b"", "must hold keys and values, not NoneType"),
        (b"a: \xff", "is not UTF-8 text"),
        (b"1: 2\n", "1"),
    ):
        (tmp_path / "bad.yaml").write_bytes(text)
        assert message in refused(tmp_path / "bad.yaml")


def test_yaml_that_would_make_objects_is_refused_and_runs_nothing(tmp_path):
    trap = tmp_path / "sprung"
    for tag in (
        f"!!python/object/apply:os.mkdir ['{trap}']",
        f"!!python/object/new:os.mkdir ['{trap}']",
        "!!python/name:os.system",
    ):
        (tmp_path / "bad.yaml").write_text(f"run_dir: {tag}\n")
        message = refused(tmp_path / "bad.yaml")
        assert "is not YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/" in message
    assert not trap.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.benign=null"], "the loss_gap scorer needs data.benign and selector.reference"),
        (["selector.reference=null"], "the loss_gap scorer needs data.benign and selector.reference"),
        (
            ["data.benign=null", "scoring.scorers=[pharmacist]", "comparison.selections=[all]", "alignment.replay=5"],
            "alignment.replay needs data.benign; add it or set alignment.replay=0",
        ),
        (["resources.workers=3"], "selector.warmup.batch_size=16 must be a multiple of resources.workers × accumulation = 3"),
        (["attacks.0.train.accumulation=4"], "attacks.0.train.batch_size=10 must be a multiple of"),
        (["selector.checkpoints=[10,40]"], "selector.checkpoints must rise and end by selector.warmup.steps=20, got [10, 40]"),
        (["selector.checkpoints=[10,5]"], "selector.checkpoints must rise"),
        (["selector.checkpoints=[5,5]"], "selector.checkpoints must rise"),
        (["selector.warmup.weights=full"], "the selector works on an adapter"),
        (["selection.count=5"], "set exactly one of selection.ratio, selection.count and selection.threshold, got ['ratio', 'count']"),
        (["selection.ratio=null"], "set exactly one of selection.ratio, selection.count and selection.threshold, got none"),
        (["selection.scorer=ifd"], "selection 'ifd' is not among scoring.scorers; scored: loss_gap, pharmacist, random"),
        (["comparison.selections=[all, less]"], "selection 'less' is not among scoring.scorers"),
        (
            ["selection.scorer=[pharmacist, random]"],
            "selection.scorer lists 'random', which has no rank to add up; of scoring.scorers these do: loss_gap, pharmacist",
        ),
        (["selection.scorer=[loss_gap, loss_gap]"], "the scores in selection.scorer must differ, got ['loss_gap', 'loss_gap']"),
        (
            ["selection.scorer=[loss_gap, pharmacist]", "selection.combinations.loss_gap-pharmacist={loss_gap: 2}"],
            "selection.combinations.loss_gap-pharmacist must have a name of its own",
        ),
        (["selection.combinations.calibrated={loss_gap: 2}"], "selection.combinations.calibrated must have a name of its own"),
        (
            ["comparison.selections=[trusted+calibrated]", "selector.mode=iterative", "selector.inner_lr=0.1"],
            "a calibrated selection needs selector.mode=one_shot: the iterative mode has scores for candidates alone",
        ),
        (["comparison.seeds=[1, 2, 1]"], "comparison.seeds must differ, got [1, 2, 1]"),
        (["selector.mode=iterative"], "selector.mode=iterative needs selector.inner_lr above 0"),
        (["attacks.0.adapter=same", "alignment.train.weights=full"], "attack 'p10' has adapter=same, which needs weights=lora"),
        (
            ["alignment.train.weights=full", "model.dtype=bfloat16"],
            "alignment.train: full weights in bfloat16 need zero_stage 1 or higher, which keeps float32 masters",
        ),
        (
            ["attacks.0.train.weights=full", "model.dtype=bfloat16"],
            "attacks.0.train: full weights in bfloat16 need zero_stage 1 or higher",
        ),
        (["alignment.train.offload=optimizer"], "offload=optimizer needs zero_stage 1 or higher, got zero_stage=0"),
        (
            ["attacks.0.train.offload=parameters", "attacks.0.train.zero_stage=2"],
            "offload=parameters needs zero_stage 3 or higher, got zero_stage=2",
        ),
        (
            ["selector.warmup.epochs=1"],
            "the selector's trainings are given in steps: epochs of selector.warmup, reference and tov must be null",
        ),
        (["selector.reference.epochs=0.5"], "the selector's trainings are given in steps"),
        (["alignment.train.zero_stage=4"], "'alignment.train.zero_stage': Input should be 0, 1, 2 or 3, got 4"),
        (["alignment.train.epochs=0"], "'alignment.train.epochs': Input should be greater than 0, got 0"),
        (["alignment.train.save_every=-1"], "'alignment.train.save_every': Input should be greater than or equal to 0, got -1"),
        (
            ["alignment.replay=5", "alignment.replay_share=0.97"],
            "alignment.replay_share=0.97 leaves no alignment row in a batch of 10; lower it",
        ),
        (["alignment.parameters={vaccine: 2}"], "'alignment.parameters.vaccine': Input should be a valid dictionary, got 2"),
        (["resources={workers: 0, gpus_per_worker: 1}"], "resources.workers=0 trains in one process that has no GPU"),
        (["resources={workers: 0, parallel_runs: 2}"], "it needs gpus_per_worker=0 and parallel_runs=1"),
        (["resources={actors: 0, gpus_per_worker: 1}"], "resources.actors=0 scores and evaluates in one process that has no GPU"),
        (["resources.gpus_per_worker=1.5"], "resources.gpus_per_worker above 1 must be a whole number"),
        (["run_dir=s3://key:word@bucket/run"], "s3://bucket/run has credentials in it"),
        (["data.candidates.path=[a.jsonl, 's3://key:word@bucket/b.jsonl']"], "s3://bucket/b.jsonl has credentials in it"),
        (["model.path=s3://bucket/m?secret_key=word"], "s3://bucket/m has credentials in it"),
        (["run_dir=s3:/bucket/run"], "write it with two slashes and a bucket"),
        (["run_dir=7"], "run_dir must be a folder or a URI"),
    ],
)  # fmt: skip
def test_sections_that_disagree_are_found_before_anything_runs(file, overrides, message):
    found = refused(file, *overrides)
    assert message in found
    assert found.count(message) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ["alignment.train.weights=full", "model.dtype=bfloat16", "alignment.train.zero_stage=1"],
        ["alignment.train.weights=full", "model.dtype=float32"],
        ["alignment.train.offload=optimizer", "alignment.train.zero_stage=1"],
        ["attacks.0.train.offload=parameters", "attacks.0.train.zero_stage=3"],
        ["alignment.train.epochs=2.5", "attacks.0.train.epochs=1", "alignment.train.save_every=0"],
    ],
)
def test_what_a_training_can_do_is_let_through(file, overrides):
    load_config(file, overrides)


def test_the_defences_are_those_of_the_comparison_or_else_the_alignments_own(file):
    assert load_config(file).defences == ["sft"]
    assert load_config(file, ["alignment.objective=vaccine"]).defences == ["vaccine"]
    assert load_config(file, ["alignment.objective=vaccine", "comparison.defences=[booster, sft, booster]"]).defences == [
        "booster", "sft",
    ]  # fmt: skip


def test_all_disagreements_come_in_one_message(file):
    message = refused(file, "data.benign=null", "alignment.replay=5", "resources.workers=7", "comparison.selections=[all, x]")
    for part in (
        "loss_gap scorer",
        "alignment.replay needs",
        "selector.warmup.batch_size=16",
        "alignment.train.batch",
        "'x' is not",
    ):
        assert part in message


def test_two_attacks_of_one_name_and_names_that_are_no_file_names_are_refused(file):
    values = copy.deepcopy(EXAMPLE)
    values["attacks"] *= 2
    with pytest.raises(ConfigError, match=r"here: attack names must differ, got \['p10', 'p10'\]"):
        parse_config(values, where="here")
    for name in ("a/b", "", "a b", "a\n"):
        values["attacks"] = [EXAMPLE["attacks"][0] | {"name": name}]
        with pytest.raises(ConfigError, match=r"'attacks\.0\.name': String should match pattern"):
            parse_config(values, where="here")


def test_a_configuration_written_out_reads_back_equal(tmp_path, file):
    config = load_config(
        file, ["selection.quotas={b: 0.25, a: 0.5}", "attacks.0.train.lr=3e-5", "data.candidates.columns={prompt: ü}"]
    )
    (tmp_path / "out.yaml").write_text(dump_config(config), encoding="utf-8")
    again = load_config(tmp_path / "out.yaml")
    assert again == config
    assert again != load_config(file)
    assert dump_config(again) == dump_config(config)
    assert yaml.safe_load(dump_config(config))["selector"]["warmup"]["steps"] == 20


def test_a_configuration_cannot_be_changed(file):
    config: Config = load_config(file)
    with pytest.raises(ValueError, match="frozen"):
        config.selection.ratio = 0.1


def test_a_uri_as_run_directory_is_kept_as_it_is(file):
    uri = "s3://bucket/runs/first?region=eu-west-1"
    config = load_config(file, [f"run_dir={uri}"])
    assert str(config.run_dir) == uri
    assert str(located(config).run_dir) == uri
    again = yaml.safe_load(dump_config(config))
    assert again["run_dir"] == uri


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"kind": "generative", "pth": 1}, "unknown key 'evaluation.judge.pth' (did you mean 'path'?)"),
        (
            ["phrases", {"kind": "x", "threshold": 2}],
            "'evaluation.judge.1.threshold': Input should be less than or equal to 1, got 2",
        ),
        ([], "'evaluation.judge': List should have at least 1 item after validation, not 0, got []"),
        (["phrases", "phrases"], "the judges in evaluation.judge must differ by kind or name, got phrases, phrases"),
        ({"kind": "x", "template": "a", "template_file": "b"}, "judge 'x': give template or template_file, not both"),
        ({"path": "x"}, "'evaluation.judge.kind' is missing"),
    ],
)
def test_a_judge_that_is_wrong_is_one_problem(judge, message):
    values = copy.deepcopy(EXAMPLE)
    values["evaluation"]["judge"] = judge
    with pytest.raises(ConfigError) as error:
        parse_config(values, where="f")
    assert str(error.value) == f"f: {message}"


def test_judges_by_name_and_with_settings_are_one_list_and_read_back_equal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    values = copy.deepcopy(EXAMPLE)
    mine = {"kind": "generative", "path": "org/judge", "template_file": "mine.yaml"}
    values["evaluation"] |= {"judge": ["classifier", mine], "judge_path": "org/classifier"}
    config = parse_config(values, where="f")
    evaluation = config.evaluation
    assert [(one.kind, one.path) for one in evaluation.judges] == [("classifier", "org/classifier"), ("generative", "org/judge")]
    assert parse_config(yaml.safe_load(dump_config(config)), where="f") == config
    assert located(config).evaluation.judges[1].template_file == str(tmp_path / "mine.yaml")
    assert located(config).evaluation.judges[1].path == "org/judge"


def test_prompts_go_by_the_name_of_a_public_set_and_read_back_equal(file):
    sets = ("evaluation.harmful_prompts={name: beavertails}", "evaluation.benign_prompts={name: or-bench-hard, path: data/or}")
    config = load_config(file, sets)
    harmful, benign = config.evaluation.harmful_prompts, config.evaluation.benign_prompts
    assert (harmful.path, harmful.split) == (["hf:PKU-Alignment/BeaverTails-Evaluation"], "test")
    assert benign.path == ["data/or"]
    assert parse_config(yaml.safe_load(dump_config(config)), where="again") == config
    plain = load_config(file).evaluation.harmful_prompts
    assert "name" not in plain.model_dump()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (
            "{name: harmbnch}",
            "unknown prompt set 'harmbnch' (did you mean 'harmbench'?); known: beavertails, do-not-answer, harmbench, or-bench, "
            "or-bench-hard, or-bench-toxic, sorry-bench, strongreject, xstest-safe, xstest-unsafe; of your own prompts give the path alone",
        ),
        ("{name: harmbench, columns: {prompt: a}}", "the columns of prompt set 'harmbench' are known; leave columns out"),
        (
            "{split: test}",
            "prompts need a path, or the name of a public set: beavertails, do-not-answer, harmbench, or-bench, or-bench-hard, "
            "or-bench-toxic, sorry-bench, strongreject, xstest-safe, xstest-unsafe",
        ),
    ],
)
def test_prompts_that_are_none_are_said(file, prompts, message):
    assert refused(file, f"evaluation.harmful_prompts={prompts}") == f"{file}: {message}"
