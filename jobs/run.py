"""Everything from ingestion to the report, as `pharmacist run` does; what is finished is kept."""

from jobs.entry import job

if __name__ == "__main__":
    job(__doc__, ("run",))
