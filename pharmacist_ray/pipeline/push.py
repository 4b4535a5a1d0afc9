"""`pharmacist push`: a curated selection or an aligned adapter onto a hub, with a card, private unless somebody says otherwise."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from pharmacist_ray.config.finetune import Defence
from pharmacist_ray.config.schema import Config
from pharmacist_ray.errors import ArtifactError, ConfigError, unknown_name
from pharmacist_ray.evaluation.evaluate import without_draw
from pharmacist_ray.models.hub import on_hub
from pharmacist_ray.pipeline.console import console, escaped, say
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.variants import Variant
from pharmacist_ray.report.cards import adapter_card, dataset_card
from pharmacist_ray.storage import json_of, local_copy

KINDS = ("curated", "adapter")
"""What can be pushed."""
UNKNOWN = "unknown"
"""What a hub calls a licence that nobody has stated."""


def run_push(
    config: Config,
    what: str,
    repo: str,
    *,
    arm: str | None = None,
    defence: str | None = None,
    licence: str | None = None,
    base: str | None = None,
    public: bool = False,
    dry_run: bool = False,
) -> list[str]:
    """Send files to a repository on a hub, made if it is not there, and return their names.

    The token is the hub's library's own: ``HF_TOKEN``, or that of its login. Nothing is sent that names a place on this machine: not the
    rows' sources, no manifest, and of an adapter's configuration not the base's folder.

    Args:
        config: A run's configuration.
        what: ``curated``, the selection's data files, or ``adapter``, that of an aligned model.
        repo: ``owner/name``.
        arm: Which arm of the comparison; default: the main selection.
        defence: Which defence aligned it; default: the first.
        licence: An identifier as hubs have it, for example ``apache-2.0``; default: that of the candidates' or the base's own card.
        base: The base's name on the hub, where ``model.path`` is a folder.
        public: Whether everybody may see it.
        dry_run: Show what would be sent, and send nothing.

    Raises:
        ConfigError: Nobody has said under which licence, or what is asked for is no part of the run.
        ArtifactError: It is not made yet, or the hub refuses.
    """
    if what not in KINDS:
        raise unknown_name("thing to push", what, KINDS)
    if not on_hub(repo) or "@" in repo:
        raise ConfigError(f"'{repo}' is no name on a hub; it has the form owner/name")
    run = Run(config)
    with tempfile.TemporaryDirectory(prefix="pharmacist-push-") as place:
        folder = Path(place)
        if what == "curated":
            _curated(run, folder, repo, arm, licence)
        else:
            _adapter(run, folder, repo, arm, defence, licence, base)
        files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        kind = "dataset" if what == "curated" else "model"
        size = sum((folder / file).stat().st_size for file in files)
        seen = "public" if public else "private"
        say(f"  {kind} {escaped(repo)}, {seen}: {len(files)} files, {size / 2**20:.1f} MiB")
        for file in files:
            say(f"    {escaped(file)}")
        if dry_run:
            console.print((folder / "README.md").read_text(encoding="utf-8"), markup=False, highlight=False)
            say("  a dry run: nothing was sent")
            return files
        with _refusals(repo):
            api = HfApi()
            api.create_repo(repo, repo_type=kind, private=not public, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo, repo_type=kind, folder_path=folder, commit_message=f"Upload {what} with pharmacist_ray"
            )
        say(f"  sent: {escaped(done.repo_url)}")
    return files


def _curated(run: Run, folder: Path, repo: str, arm: str | None, licence: str | None) -> None:
    """Put the data files of a selection and its card into a folder."""
    chosen = arm or run.main_arm
    if chosen not in run.selections:
        raise unknown_name("selection", chosen, run.selections)
    source = run.selected(chosen).require()
    manifest = json_of(source / "manifest.json")
    (folder / "data").mkdir()
    for name in manifest["files"]:
        (folder / name).symlink_to(local_copy(source / name).resolve())  # which may be many gigabytes
    stated = licence or _stated(run.config.data.candidates.path)
    if stated is None:
        raise ConfigError(
            "the candidates state no licence: say under which these rows may be published, --license apache-2.0 or another"
        )
    (folder / "README.md").write_text(dataset_card(manifest, name=repo, licence=stated), encoding="utf-8")


def _adapter(
    run: Run, folder: Path, repo: str, arm: str | None, defence: str | None, licence: str | None, base: str | None
) -> None:
    """Put an aligned model's adapter and its card into a folder."""
    config = run.config
    if config.alignment.train.weights == "full":
        raise ConfigError("alignment.train.weights=full makes a whole model and no adapter; upload its folder with `hf upload`")
    variant = _variant(run, arm or run.main_arm, defence)
    source = run.trained(variant).require() / "run" / "adapter"
    path = config.model.path if on_hub(config.model.path) else base or ""
    name, _, revision = path.partition("@")
    if not name:
        raise ConfigError(
            f"model.path is the folder {config.model.path}, which nobody else has: give its name on the hub, --base OWNER/NAME"
        )
    (folder / "adapter_model.safetensors").symlink_to(local_copy(source / "adapter_model.safetensors").resolve())
    settings = json_of(source / "adapter_config.json") | {"base_model_name_or_path": name, "revision": revision or None}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    stated = licence or _stated([config.model.path])
    if stated is None:
        raise ConfigError(
            "the base states no licence: say under which the adapter may be published, --license apache-2.0 or another"
        )
    rows = []
    if config.evaluation is not None and run.evaluated.ready:
        wanted = without_draw(variant.selection), variant.defence
        table = json_of(run.evaluated.folder / "table.json")
        rows = [row for row in table if (row["selection"], row["defence"]) == wanted and "over" not in row]
    card = adapter_card(
        name=repo,
        licence=stated,
        base=name,
        arm=variant.selection,
        defence=variant.stages.alignment,
        kept=run.kept(variant.selection),
        rows=rows,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _variant(run: Run, arm: str, defence: str | None) -> Variant:
    known = [one for one in run.variants if one.selection != "none"]
    if arm not in (arms := list(dict.fromkeys(one.selection for one in known))):
        raise unknown_name("arm of comparison.selections", arm, arms)
    wanted = Defence.of(defence).name if defence else known[0].defence
    found = next((one for one in known if (one.selection, one.defence) == (arm, wanted)), None)
    if found is None:
        raise unknown_name("defence", wanted, list(dict.fromkeys(one.defence for one in known)))
    return found


def _stated(paths: Sequence[str]) -> str | None:
    """Return the licence that the card of a folder states, if all of these state the same one."""
    found = set()
    for path in paths:
        card = Path(path).expanduser() / "README.md"
        parts = card.read_text(encoding="utf-8").split("---", 2) if card.is_file() else []
        try:
            front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
        except yaml.YAMLError:
            front = None
        found.add(front.get("license") if isinstance(front, dict) else None)
    one = found.pop() if len(found) == 1 else None
    return one if isinstance(one, str) and one != UNKNOWN else None


@contextmanager
def _refusals(repo: str) -> Iterator[None]:
    """Turn what the hub's library raises into one line."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ArtifactError("HF_HUB_OFFLINE is set: nothing is sent; unset it to push") from error
    except LocalTokenNotFoundError as error:
        raise ArtifactError("the hub needs a token: set HF_TOKEN, or log in with `hf auth login`") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        advice = (
            "set HF_TOKEN to a token that may write there" if status in (401, 403) else "try again, or look at the repository"
        )
        first = " ".join(str(error).split())[:200]
        raise ArtifactError(f"the hub refuses to take {repo} ({status}: {first}); {advice}") from error
    except OSError as error:
        raise ArtifactError(f"the hub cannot be reached ({type(error).__name__}: {error}); try again") from error
