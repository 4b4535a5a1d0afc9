"""Let an attacker search for the worst fine-tune of every arm; submitted again, it goes on where it was."""

from jobs.entry import job
from pharmacist_ray.search.redteam import run_redteam

if __name__ == "__main__":
    job(__doc__, work=run_redteam)
