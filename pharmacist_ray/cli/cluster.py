"""The commands that talk to a cluster: ``pharmacist submit`` and ``pharmacist job``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pharmacist_ray.cli.complete import job_names, override_keys
from pharmacist_ray.errors import ConfigError, unknown_name

Address = Annotated[
    str | None,
    typer.Option(help="URL of the head's dashboard, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS, or RAY_ADDRESS if a URL."),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The id that `submit` printed.")]

job_app = typer.Typer(name="job", help="Look at submitted jobs of a cluster, or stop one.", no_args_is_help=True)


def submit(
    job: Annotated[
        str,
        typer.Argument(
            help="run, curate, align, evaluate, search, redteam, audit, finetune or benchmark.", autocompletion=job_names
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Overrides; for benchmark its own options, after `--`.", autocompletion=override_keys
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The run's YAML file, which travels with the job; not for benchmark.")
    ] = None,
    address: Address = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(
            help="A folder to send along and start in, for example a checkout whose code is to run. Without .git, .venv, runs and what "
            ".gitignore and .rayignore name. Default: nothing but the configuration is sent, and the nodes run what they have installed."
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            help="A variable for the job and its workers, NAME=VALUE, or NAME to take the value from here; repeat for several. Whoever "
            "has access to the cluster can read it: credentials are better mounted on the nodes."
        ),
    ] = None,
    id: Annotated[str | None, typer.Option("--id", help="An id of your own for the job.")] = None,
    follow: Annotated[bool, typer.Option(help="Print the job's log until it ends, and exit with its exit code.")] = True,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs for the job's own process; with 0 it runs on the head.")] = 0,
    resource: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=AMOUNT", help="What else that process takes: GPU=1, memory=BYTES, or a resource of your nodes."
        ),
    ] = None,
    runtime_env: Annotated[
        Path | None, typer.Option(help="A YAML file with a runtime environment of Ray's, for example pip or py_modules.")
    ] = None,
) -> None:
    """Run a job on a Ray cluster. Submit the same line again after an interruption: what is finished is kept."""
    from pharmacist_ray.cli import jobs
    from pharmacist_ray.cli import submit as sending

    if job not in sending.JOBS:
        raise unknown_name("job", job, sending.JOBS)
    if (config is None) != (job == "benchmark"):
        raise ConfigError("benchmark takes no --config" if config else f"{job} needs --config FILE; `pharmacist init` writes one")
    paths = []
    if config is not None:  # what is wrong in it is known before anything is sent
        from pharmacist_ray.config import load_config

        loaded = load_config(config, arguments or [])
        sending.check_paths(loaded)
        paths = sending.reached_by_all(loaded)
    variables = sending.environment(env or [])
    takes, runtime = sending.resources(resource or []), sending.runtime_env(runtime_env) if runtime_env else None
    client = jobs.connect(address)
    given = sending.submit(
        client,
        job,
        arguments or [],
        config=config,
        working_dir=working_dir,
        env=variables,
        id=id,
        cpus=cpus,
        takes=takes,
        runtime=runtime,
    )
    typer.echo(f"submitted {job} as job {given} to {client.get_address()}")
    if paths:
        typer.echo(f"every node has to reach {', '.join(paths[:6])}{' and more' if len(paths) > 6 else ''}")
    if not follow:
        typer.echo(f"follow it: pharmacist job logs {given} --follow; stop it: pharmacist job stop {given}")
        return
    raise typer.Exit(jobs.follow(client, given))


@job_app.command("list")
def list_jobs(address: Address = None) -> None:
    """List the submitted jobs, the latest first."""
    from pharmacist_ray.cli import jobs

    jobs.show_jobs(jobs.connect(address))


@job_app.command()
def status(id: JobId, address: Address = None) -> None:
    """Say how a job is."""
    from pharmacist_ray.cli import jobs

    jobs.show_status(jobs.connect(address), id)


@job_app.command()
def logs(
    id: JobId,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends; exit with its exit code.")] = False,
) -> None:
    """Print a job's log."""
    from pharmacist_ray.cli import jobs

    if follow:
        raise typer.Exit(jobs.follow(jobs.connect(address), id))
    jobs.show_log(jobs.connect(address), id)


@job_app.command()
def stop(id: JobId, address: Address = None) -> None:
    """Stop a job and wait until it has ended; what it had finished stays."""
    from pharmacist_ray.cli import jobs

    jobs.stop(jobs.connect(address), id)
