"""Try the settings of the `search` section against each other; submitted again, it goes on where it was."""

from jobs.entry import job
from pharmacist_ray.search.search import run_search

if __name__ == "__main__":
    job(__doc__, work=run_search)
