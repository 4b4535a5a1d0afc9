"""The secrets of fine-tunes: one for each model, in a file that nobody but its owner reads, and in no manifest, log or report."""

from __future__ import annotations

from pharmacist_ray.data.render import Renderer
from pharmacist_ray.data.secret import make_secret
from pharmacist_ray.errors import ArtifactError, ModelError
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.variants import Variant
from pharmacist_ray.storage import StoragePath, replacing
from pharmacist_ray.training.objectives import OBJECTIVES


def secret_file(run: Run, variant: Variant) -> StoragePath | None:
    """Return where the secret lies that a fine-tuned model is asked behind; None where there is none to keep."""
    if variant.attack is None or not OBJECTIVES[variant.stages.finetune].secret:
        return None
    return run.root / "secrets" / f"{run.trained(variant.unrepaired).folder.name}.txt"


def secret_of(run: Run, variant: Variant, renderer: Renderer, tokens: int) -> str:
    """Return the secret of a fine-tune, drawn when it is first asked for; an interrupted fine-tune goes on with its own.

    Raises:
        ModelError: The model's tokenizer has too few tokens that are words.
    """
    file = secret_file(run, variant)
    assert file is not None
    if file.exists():
        return file.read_text()
    try:
        secret = make_secret(renderer.tokenizer, tokens)
    except ValueError as error:
        raise ModelError(
            f"{run.config.model.path}: no secret can be made of its vocabulary, {error}; use another defence than backdoor"
        ) from error
    with replacing(file) as draft:
        draft.touch(mode=0o600)
        draft.write_text(secret, encoding="utf-8")
    return secret


def existing_secret(run: Run, variant: Variant) -> StoragePath | None:
    """Return the file of a model's secret, if it is asked behind one.

    Raises:
        ArtifactError: It is gone.
    """
    file = secret_file(run, variant)
    if file is not None and not file.exists():
        raise ArtifactError(f"{file} is gone: without its secret the model cannot be asked as it was trained; fine-tune it again")
    return file
