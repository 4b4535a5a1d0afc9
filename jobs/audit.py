"""Audit the rows that `audit.data` names; submitted again, it does what is missing."""

from jobs.entry import job
from pharmacist_ray.pipeline.audit import run_audit

if __name__ == "__main__":
    job(__doc__, work=run_audit)
