"""Fine-tune the aligned model on the rows that `finetune.data` names, defended and repaired; submitted again, it does what is missing."""

from jobs.entry import job
from pharmacist_ray.pipeline.finetune import run_finetune

if __name__ == "__main__":
    job(__doc__, work=run_finetune)
