"""Entry points for `ray job submit -- python -m jobs.curate --config …`: the command line's stages, a few lines each."""

from pharmacist_ray.cli.process import private_ray

private_ray()  # without a cluster a job runs on this machine; before Ray is imported
