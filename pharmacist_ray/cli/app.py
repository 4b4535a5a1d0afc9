"""The ``pharmacist`` command: one sub-command a stage, ``--config`` and dotted overrides, no flag per field."""

from __future__ import annotations

import contextlib
import gc
import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pharmacist_ray import __version__
from pharmacist_ray.cli.cluster import job_app, submit
from pharmacist_ray.cli.options import ConfigOption, Overrides
from pharmacist_ray.cli.process import plain_failures, private_ray
from pharmacist_ray.cli.testbed import benchmark, grade, plant, testbed
from pharmacist_ray.errors import ArtifactError, ConfigError


class _Commands(TyperGroup):
    """Commands that end as `plain_failures` says, before Typer can make an interruption a failure like others."""

    def invoke(self, ctx: Any) -> Any:
        with plain_failures():
            return super().invoke(ctx)


app = typer.Typer(
    name="pharmacist",
    cls=_Commands,
    help="Rank safety-alignment data against harmful fine-tuning, align on the best of it, and measure what that is worth.",
    epilog="Start with `pharmacist init`, look at what it wrote, then `pharmacist run --config pharmacist.yaml`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Strict = Annotated[bool, typer.Option("--strict", help="Make a broken row an error instead of putting it into quarantine.")]
Defences = Annotated[
    str | None, typer.Option(help="Objectives to cross with every selection, for example sft,vaccine,booster; over the file's.")
]
START, STAGES, RESULTS, TESTBED, CLUSTER = "Start here", "Stages", "Search and report", "Testbed", "Cluster"
"""Panels of the help, in the order of their first commands below."""

app.add_typer(job_app, rich_help_panel=CLUSTER)


def _show_version(wanted: bool) -> None:
    if wanted:
        under = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "transformers", "deepspeed"))
        typer.echo(f"pharmacist {__version__} ({under})")
        raise typer.Exit


@app.callback()
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say which versions these are, and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand not in ("submit", "job"):  # which talk to a cluster, with its token
        private_ray()


def main() -> None:
    """Run the command line."""
    try:
        app()
    finally:
        gc.freeze()  # Python would look for garbage in all that was imported, for seconds, before it ends


def _stage(name: str, config: Path, overrides: list[str] | None, strict: bool = False) -> None:
    from pharmacist_ray.config import load_config

    loaded = load_config(config, overrides or [])
    if not strict and name != "report":
        from pharmacist_ray.pipeline.standing import stands

        if stands((name,), loaded):
            return
    from pharmacist_ray.runtime.imports import importing

    with importing():
        from pharmacist_ray.pipeline.session import run_stage  # imports torch and ray: not for --help, nor for a mistake

    run_stage(name, loaded, strict=strict)


@app.command(rich_help_panel=START)
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("pharmacist.yaml"),
    every: Annotated[
        bool, typer.Option("--all", help="Write every key there is, and not only those that most runs set.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    data: Annotated[
        str | None,
        typer.Option("--from", help="Look at this data, a file, folder, glob, URI or hf:NAME, and fill in how it is to be read."),
    ] = None,
    split: Annotated[str, typer.Option(help="The split of a Hugging Face data set.")] = "train",
    model: Annotated[
        str | None, typer.Option(help="Look at this model, and fill in how long the rows are in its tokens.")
    ] = None,
    trusted: Annotated[str | None, typer.Option(help="Trusted safe rows, or a public set; default: beavertails-safe.")] = None,
    harmful: Annotated[str | None, typer.Option(help="Harmful rows, or a public set; default: beavertails-unsafe.")] = None,
    benign: Annotated[str | None, typer.Option(help="Trusted ordinary rows, or a public set; default: dolly.")] = None,
) -> None:
    """Write a commented configuration to start from, and beside it the JSON Schema by which editors complete and check it.

    With --from and --model it is filled in for them: layout, columns, category, lengths. Trusted sets that are not given are public ones.
    """
    from pharmacist_ray.config.template import schema, template

    if path.exists() and not force:
        raise ArtifactError(f"{path} is there already; choose another name or pass --force")
    values, seen = None, list[str]()
    if any((data, model, trusted, harmful, benign)):
        from pharmacist_ray.doctor.propose import propose

        values, seen = propose(data, model, split, validation=trusted, harmful=harmful, benign=benign)
    try:
        described = path.with_suffix(".schema.json")
        path.write_text(template(values, every=every, schema_file=described.name), encoding="utf-8")
        described.write_text(json.dumps(schema(), indent=1), encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror}; choose another name") from error
    if seen:
        from pharmacist_ray.data.printable import printable

        typer.echo("\n".join(map(printable, seen)))
    missing = [name for name, given in (("model.path", model), ("data.candidates", data)) if seen and not given]
    fill_in = " and ".join(missing) if seen else "model.path and data.*"
    then = (
        f"fill in {fill_in}, then `pharmacist doctor --config {path}`"
        if fill_in
        else f"next: `pharmacist doctor --config {path}`"
    )
    typer.echo(f"wrote {path}: {then}")


@app.command("schema", rich_help_panel=START)
def show_schema() -> None:
    """Print the JSON Schema of a configuration, by which editors complete and check one."""
    from pharmacist_ray.config.template import schema

    typer.echo(json.dumps(schema(), indent=1))


@app.command(rich_help_panel=START)
def doctor(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Check this run's file, too.")] = None,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="NODES",
            help="Plan the run for these GPUs: 16xH100, 2x8xA100-40 (nodes × GPUs), 8xH100,4xL40S, or `connected` for RAY_ADDRESS's.",
        ),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Put the planned layout into this copy of the file, or into the file itself."),
    ] = None,
    rows: Annotated[float | None, typer.Option(min=1, help="Candidates to plan for; default: as their files tell.")] = None,
    network: Annotated[
        float | None, typer.Option(min=0.1, help="Gbit/s of each node's network; default: as clouds have it.")
    ] = None,
) -> None:
    """Say in words what this machine and this configuration can run; with --cluster, how to lay the run out there, and how long."""
    if cluster is not None:
        from pharmacist_ray.cli.plan import plan_run

        plan_run(config, overrides or [], cluster, write=write, rows=rows, network=network)
        return
    if write or rows or network:
        raise ConfigError(
            "--write, --rows and --network are about a plan, which --cluster asks for, for example --cluster 16xH100"
        )
    from pharmacist_ray.doctor.examine import examine

    examine(config, overrides or [])


@app.command(rich_help_panel=START)
def example(
    folder: Annotated[Path, typer.Argument(help="Folder for the model, the data sets and config.yaml.")],
    size: Annotated[
        str,
        typer.Option(help="small: one seed. large: three seeds and three attacks. It ends with how long the run will take here."),
    ] = "small",
    seed: Annotated[int, typer.Option(help="Draws the data; the same seed writes the same files.")] = 0,
    safety: Annotated[
        Path | None, typer.Option(help="JSONL of your prompt/response pairs with safe answers; with --benign.")
    ] = None,
    benign: Annotated[Path | None, typer.Option(help="JSONL of your ordinary prompt/response pairs; with --safety.")] = None,
    model: Annotated[Path | None, typer.Option(help="Take the model in this folder instead of SmolLM2-135M-Instruct.")] = None,
) -> None:
    """Get a small real chat model, and write data sets in plain English and a config to run on it."""
    from pharmacist_ray.example.make import make_example

    make_example(folder, size=size, seed=seed, safety=safety, benign=benign, model=model)


@app.command(rich_help_panel=START)
def plugins() -> None:
    """List the scorers, objectives, judges, exports and trackers there are, those of installed packages too, and which cannot be loaded."""
    from pharmacist_ray.doctor.plugins import show_plugins

    show_plugins()


@app.command(rich_help_panel=STAGES)
def run(config: ConfigOption, overrides: Overrides = None, strict: Strict = False, defences: Defences = None) -> None:
    """All stages, or those whose inputs changed: ingest, fit, score, select, align, attack, evaluate, report."""
    crossed = [f"comparison.defences=[{defences}]"] if defences else []
    _stage("run", config, [*(overrides or []), *crossed], strict)


@app.command(rich_help_panel=STAGES)
def ingest(config: ConfigOption, overrides: Overrides = None, strict: Strict = False) -> None:
    """Read and check every data set; broken rows go to quarantine with file, line and reason."""
    _stage("ingest", config, overrides, strict)


def _stage_command(name: str, words: str, panel: str = STAGES) -> None:
    def command(config: ConfigOption, overrides: Overrides = None) -> None:
        _stage(name, config, overrides)

    app.command(name, help=words, rich_help_panel=panel)(command)


_stage_command("fit", "Fit the selector: warm-up, simulated attack, and the direction that candidates are measured along.")
_stage_command("score", "Score every candidate by every configured scorer.")
_stage_command("select", "Write the curated subset: the rows to align on.")
_stage_command("align", "Align the model on every arm of the comparison.")
_stage_command("attack", "Fine-tune the aligned models on a user's task with harmful rows mixed in.")


@app.command(rich_help_panel=STAGES)
def evaluate(
    config: ConfigOption,
    overrides: Overrides = None,
    lm_eval: Annotated[
        str | None,
        typer.Option("--lm-eval", metavar="TASKS", help="Measure every model by these tasks of lm-evaluation-harness too."),
    ] = None,
    inspect: Annotated[bool, typer.Option("--inspect", help="Write answers and verdicts as logs of inspect too.")] = False,
) -> None:
    """Let every model answer, judge the answers, and write evaluation/summary.json."""
    more = [f"evaluation.lm_eval.tasks=[{lm_eval}]"] * (lm_eval is not None) + ["evaluation.inspect=true"] * inspect
    _stage("evaluate", config, [*(overrides or []), *more])


@app.command(rich_help_panel=RESULTS)
def report(
    config: ConfigOption,
    overrides: Overrides = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Show the page on this machine and follow the run, until Ctrl-C.")
    ] = False,
    port: Annotated[int, typer.Option(help="Where --serve listens; 0 takes a free port.")] = 8266,
) -> None:
    """Print the comparison as a table, and write it and a page of the whole run to report/."""
    if not serve:
        _stage("report", config, overrides)
        return
    from pharmacist_ray.config import load_config
    from pharmacist_ray.report.serve import HOST, server

    run = load_config(config, overrides or []).run_dir.resolve()
    with server(run, port) as listening:
        typer.echo(f"{run} is shown at http://{HOST}:{listening.server_port}/ until Ctrl-C")
        with contextlib.suppress(KeyboardInterrupt):
            listening.serve_forever()


@app.command(rich_help_panel=RESULTS)
def search(
    config: ConfigOption,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where trials of another `search` section are, and keep those that fit.")
    ] = False,
    agreement: Annotated[
        bool,
        typer.Option("--agreement", help="Run nothing: say what an early look at the finished trials would have been worth."),
    ] = False,
) -> None:
    """Try the settings of the `search` section against each other, and recommend one; finished trials are kept."""
    from pharmacist_ray.config import load_config

    loaded = load_config(config, overrides or [])
    if agreement:
        from pharmacist_ray.search.agreement import show_agreement

        show_agreement(loaded)
        return
    from pharmacist_ray.search.search import run_search

    run_search(loaded, resume=resume)


@app.command(rich_help_panel=RESULTS)
def audit(
    data: Annotated[str, typer.Argument(help="Rows of a fine-tune: a file, folder, glob or URI, as candidates are given.")],
    config: ConfigOption,
    overrides: Overrides = None,
) -> None:
    """Flag rows of a fine-tune that look harmful, by the `audit` section, and write what is left; nothing is dropped without a record."""
    from pharmacist_ray.config import load_config
    from pharmacist_ray.pipeline.audit import run_audit

    run_audit(load_config(config, overrides or []), [data])


@app.command(rich_help_panel=RESULTS)
def finetune(
    data: Annotated[str, typer.Argument(help="The user's rows: a file, folder, glob or URI, as candidates are given.")],
    config: ConfigOption,
    overrides: Overrides = None,
) -> None:
    """Fine-tune the model that is aligned on the curated set on a user's rows, defended and repaired by the `finetune` section."""
    from pharmacist_ray.config import load_config
    from pharmacist_ray.pipeline.finetune import run_finetune

    run_finetune(load_config(config, overrides or []), [data])


@app.command(rich_help_panel=RESULTS)
def push(
    what: Annotated[str, typer.Argument(help="curated, the selection's data files, or adapter, that of an aligned model.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; made if it is not there.")],
    config: ConfigOption,
    overrides: Overrides = None,
    arm: Annotated[str | None, typer.Option(help="Which arm; default: the main selection.")] = None,
    defence: Annotated[str | None, typer.Option(help="Which defence aligned it; default: the first.")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="For example apache-2.0; default: what the source states.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base's name on the hub, where model.path is a folder.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")] = False,
) -> None:
    """Publish the curated set or an aligned adapter on a hub, with a card; private unless --public. The token is HF_TOKEN's."""
    from pharmacist_ray.config import load_config
    from pharmacist_ray.pipeline.push import run_push

    loaded = load_config(config, overrides or [])
    run_push(loaded, what, repo, arm=arm, defence=defence, licence=licence, base=base, public=public, dry_run=dry_run)


@app.command(rich_help_panel=RESULTS)
def redteam(config: ConfigOption, overrides: Overrides = None) -> None:
    """Let an attacker search for the worst fine-tune of every arm, by the `redteam` section; finished trials are kept."""
    from pharmacist_ray.config import load_config
    from pharmacist_ray.search.redteam import run_redteam

    run_redteam(load_config(config, overrides or []))


for bench_command in (benchmark, testbed, plant, grade):
    app.command(rich_help_panel=TESTBED)(bench_command)
app.command(rich_help_panel=CLUSTER)(submit)
