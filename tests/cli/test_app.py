from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig
from typer import rich_utils

from pharmacist_ray import __version__
from pharmacist_ray.cli import app as module
from pharmacist_ray.cli.app import app, main
from pharmacist_ray.cli.complete import override_keys
from pharmacist_ray.config import load_config
from pharmacist_ray.config.template import EXAMPLE
from pharmacist_ray.errors import DataError
from pharmacist_ray.pipeline.stages import STAGES


@pytest.fixture
def pharmacist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return a function that runs the command line as its entry point does, and gives (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pharmacist", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(EXAMPLE | {"run_dir": str(tmp_path / "run")}))
    return tmp_path / "run.yaml"


def test_help_names_every_stage_and_how_to_start(pharmacist):
    code, out, _ = pharmacist("--help")
    assert code == 0
    for command in ("run", *STAGES, "doctor", "init", "testbed", "plant", "grade"):
        assert f" {command} " in out
    assert "pharmacist init" in out
    for stage in STAGES:
        assert pharmacist(stage, "-h")[0] == 0


@pytest.mark.parametrize("columns", ["80", "120"])
def test_help_sorts_the_commands_into_panels_and_cuts_no_line(pharmacist, columns, monkeypatch):
    monkeypatch.setattr(rich_utils, "MAX_WIDTH", int(columns))
    out = pharmacist("--help")[1]
    panels = re.findall(r"^╭─ (.+?) ─", out, re.MULTILINE)
    assert panels == ["Options", "Start here", "Stages", "Search and report", "Testbed", "Cluster"]
    assert "…" not in out
    listed = re.findall(r"^│ (\w+) ", out, re.MULTILINE)
    assert len(listed) == len(app.registered_commands) + 1  # and `job`


def test_the_version_names_what_is_underneath_without_importing_it():
    code = (
        "import sys; from pharmacist_ray.cli.app import app; app(['--version'], standalone_mode=False); "
        "print([name for name in ('torch', 'ray', 'transformers', 'deepspeed') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    under = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "transformers", "deepspeed"))
    assert out == f"pharmacist {__version__} ({under})\n[]\n"


def completed(line: str, shell: str = "bash") -> list[str]:
    """Return what a shell would offer at the end of a line."""
    words = line.split(" ")
    code = "import sys; sys.argv = ['pharmacist']; from pharmacist_ray.cli.app import main; main()"
    variables = {"_PHARMACIST_COMPLETE": f"complete_{shell}", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **variables})
    assert done.stderr == ""
    return done.stdout.split()


def test_the_shell_completes_commands_jobs_and_keys():
    assert completed("pharmacist al") == ["align"]
    assert completed("pharmacist submit cu") == ["curate"]
    assert completed("pharmacist run -c x.yaml selection.ra") == ["selection.ratio="]
    assert override_keys("alignment.harmful.path") == ["alignment.harmful.path="]
    assert override_keys("attacks.0.train.lr") == ["attacks.0.train.lr="]


def test_the_completion_is_shown():
    code = "import sys; sys.argv = ['pharmacist', '--show-completion']; from pharmacist_ray.cli.app import main; main()"
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}"; exit $?'], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "_PHARMACIST_COMPLETE=complete_bash" in done.stdout


def test_help_is_there_before_torch_and_ray_are():
    code = (
        "import sys; from pharmacist_ray.cli.app import app; "
        "print([name for name in ('torch', 'ray', 'transformers', 'pydantic') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_init_writes_a_file_that_loads_and_never_replaces_one_unasked(pharmacist, tmp_path):
    target = tmp_path / "new.yaml"
    code, out, _ = pharmacist("init", target)
    assert code == 0
    assert f"wrote {target}" in out
    assert load_config(target).attacks[0].name == "p10"
    first = target.read_text().partition("\n")[0]
    assert first == "# yaml-language-server: $schema=new.schema.json"
    assert json.loads((tmp_path / "new.schema.json").read_text()) == json.loads(pharmacist("schema")[1])
    long = tmp_path / "long.yaml"
    assert pharmacist("init", "--all", long)[0] == 0
    assert load_config(long) == load_config(target)
    assert len(long.read_text()) > 3 * len(target.read_text())
    target.write_text("mine")
    assert pharmacist("init", target) == (5, "", f"pharmacist: {target} is there already; choose another name or pass --force\n")
    assert target.read_text() == "mine"
    assert pharmacist("init", target, "--force")[0] == 0
    assert target.read_text() != "mine"
    nowhere = tmp_path / "none" / "new.yaml"
    assert pharmacist("init", nowhere) == (
        5,
        "",
        f"pharmacist: cannot write {nowhere}: No such file or directory; choose another name\n",
    )


def test_init_looks_at_data_and_says_what_is_left_to_fill_in(pharmacist, tmp_path):
    data, target = tmp_path / "mine.jsonl", tmp_path / "new.yaml"
    data.write_text('{"question": "a\\u001b[31m", "answer": "b"}\n')
    code, out, _ = pharmacist("init", target, "--from", data, "--trusted", data, "--harmful", data, "--benign", data)
    assert code == 0
    assert out.splitlines() == [
        "data.candidates: 1 of its 1 rows are usable (columns prompt=question, response=answer)",
        f"wrote {target}: fill in model.path, then `pharmacist doctor --config {target}`",
    ]
    config = load_config(target)
    assert config.data.candidates.columns == {"prompt": "question", "response": "answer"}
    assert (config.attacks, config.evaluation) == ([], None)
    data.write_text("")
    code, out, error = pharmacist("init", tmp_path / "other.yaml", "--from", data)
    assert (code, out, error) == (3, "", f"pharmacist: {data} has no rows that can be read\n")
    assert not (tmp_path / "other.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["scoring.scorers=[pharmacits]", "selection.scorer=pharmacits", "comparison.selections=[all]"],
            2, "unknown scorer 'pharmacits' (did you mean 'pharmacist'?)",
        ),
        (["alignment.objective=sfd"], 2, "unknown objective 'sfd' (did you mean 'sft'?)"),
        (["comparison.defences=[sft, boster]"], 2, "unknown objective 'boster' (did you mean 'booster'?)"),
        (
            ["alignment.objective=vaccine", "alignment.parameters={vaccine: {roh: 1}}"],
            2, "alignment.parameters.vaccine.roh: Extra inputs are not permitted; vaccine has rho, scope, taps",
        ),
        (["alignment.parameters={vacine: {}}"], 2, "unknown section of alignment.parameters 'vacine' (did you mean 'vaccine'?)"),
        (["alignment.train.offload=optimizer"], 2, "offload=optimizer needs zero_stage 1 or higher, got zero_stage=0"),
        (["selector.warmup.epochs=1"], 2, "the selector's trainings are given in steps"),
        (["tracking.to=[wandbb]"], 2, "unknown tracker 'wandbb' (did you mean 'wandb'?)"),
        (["evaluation.judge=classifier"], 2, "judge 'classifier' needs evaluation.judge_path"),
        (["evaluation.judge=[phrases, {kind: endpiont}]"], 2, "unknown judge 'endpiont' (did you mean 'endpoint'?)"),
        (
            ["evaluation.judge={kind: endpoint, url: 'http://h/v1', model: m, template: harmbench, key_variable: PHARMACIST_NO_KEY}"],
            2, "judge 'endpoint': its key_variable PHARMACIST_NO_KEY is not set in the environment; export it (on every node)",
        ),
        (["selection.quotas={a: 0.7, b: 0.7}"], 2, "selection.quotas must be shares from 0 to 1 that add up to at most 1"),
        (["selection.export=[trk]"], 2, "unknown export 'trk' (did you mean 'trl'?); known: alpaca, axolotl, llamafactory"),
        (["alignment.objective=nowhere_mod:mine"], 2, "objective 'nowhere_mod:mine': there is no module 'nowhere_mod'; install"),
        (["selection.ratoi=1"], 2, "unknown key 'selection.ratoi' (did you mean 'ratio'?)"),
        (["nonsense"], 2, "override 'nonsense' is not of the form dotted.key=value"),
        (["run_dir=/dev/null/run"], 2, "cannot write to run_dir=/dev/null/run: Not a directory; choose another folder"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_anything_starts(pharmacist, file, arguments, code, message):
    found, out, err = pharmacist("run", "--config", file, *arguments)
    assert (found, out) == (code, "")
    assert err.startswith("pharmacist: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (file.parent / "run").exists()


def test_a_missing_config_option_and_an_unknown_command_are_usage_errors(pharmacist):
    for arguments in (["run"], ["runn"], ["run", "--strikt"]):
        code, _, err = pharmacist(*arguments)
        assert code == 2
        assert "Usage" in err
        assert "Traceback" not in err


def test_text_of_data_in_an_error_cannot_steer_the_terminal(pharmacist, monkeypatch):
    def fail(*_: object) -> None:
        raise DataError("the template refuses\nrow \x1b]0;owned\x07 [bold]\u202eevil[/]")

    monkeypatch.setattr(module, "_stage", fail)
    code, _, err = pharmacist("fit", "-c", "x.yaml")
    assert (code, err) == (3, "pharmacist: the template refuses row ⟨U+001B⟩]0;owned⟨U+0007⟩ [bold]⟨U+202E⟩evil[/]\n")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(module, "_stage", fail)
    monkeypatch.setattr(sys, "argv", ["pharmacist", "fit", "-c", "x.yaml"])
    with pytest.raises(ZeroDivisionError):
        main()
    assert app.pretty_exceptions_enable is False


def test_the_installed_command_ends_with_the_errors_code(tmp_path):
    command = [sys.executable, "-c", "from pharmacist_ray.cli.app import main; main()", "fit", "-c", "none.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "pharmacist: cannot read the configuration none.yaml: No such file or directory; `pharmacist init` writes one\n"
    )


@pytest.mark.slow
def test_a_benchmark_prints_its_figures_and_writes_them(pharmacist, tmp_path):
    code, out, err = pharmacist("benchmark", "sft", "--rounds", "1", "--out", tmp_path / "figures")
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "figures" / "benchmark.json").read_text())
    assert [(cost["objective"], cost["ratio"]) for cost in found["costs"]] == [("sft", 1.0)]
    assert str(tmp_path / "figures" / "benchmark.json") in out.replace("\n", "")


def test_doctor_plans_for_a_cluster_and_says_what_its_options_go_with(pharmacist, file, tmp_path):
    LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=99).save_pretrained(
        tmp_path / "model"
    )
    plan = ("doctor", "--config", file, "--cluster", "2xT4", f"model.path={tmp_path / 'model'}", "--rows", "1e6")
    code, out, _ = pharmacist(*plan, "--write", file)
    assert code == 0
    assert "resources.actors                    2  was 1; one GPU each\n" in out
    assert f"wrote {file}: " in " ".join(out.split())
    assert load_config(file).resources.actors == 2
    assert load_config(file).model.path == "path/to/model"  # an override is not written
    code, _, err = pharmacist("doctor", "--config", file, "--cluster", "2xH10")
    assert (code, "unknown GPU 'H10' (did you mean 'H100'?)" in err) == (2, True)
    code, _, err = pharmacist("doctor", "--config", file, "--write", file)
    assert (code, "which --cluster asks for" in err) == (2, True)
    code, _, err = pharmacist("doctor", file, "--cluster", "2xT4")
    assert (code, "give its file by --config" in err) == (2, True)
    code, _, err = pharmacist("doctor", "model.path=x")
    assert (code, "'model.path=x' is over what a file says: give the file by --config" in err) == (2, True)
