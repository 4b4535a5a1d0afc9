"""What ran and on what, what became of the data, and how to do it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from pharmacist_ray.config.scoring import arm_of
from pharmacist_ray.data.layouts import REASONS
from pharmacist_ray.data.printable import names_a_secret, without_secrets
from pharmacist_ray.report.blocks import Block, Code, Facts, Note, Table, cut
from pharmacist_ray.report.run_files import RunFiles, readable
from pharmacist_ray.storage import matching, opened_parquet

QUARANTINED = 3
"""Broken rows shown of each source."""
_ONE = ("overlap", "planted", "proxy/fit", "proxy/scores", "fit", "scores", "evaluation")


def what_ran(run: RunFiles) -> list[Block]:
    """Return the configuration in short, versions, machines, and the artifacts with their fingerprints."""
    made = dict(_manifests(run))
    found: dict[str, set[str]] = {}
    for manifest in made.values():
        versions = {"Python": manifest.get("python"), **manifest.get("versions", {})}
        facts = {"versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version)}
        for name, value in (*facts.items(), *_flat(manifest.get("machine", {}), "machine")):
            found.setdefault(name, set()).add(value)
    items = [*_summary(run.config), *((name, " — and — ".join(sorted(values))) for name, values in found.items())]
    blocks: list[Block] = [Facts(items)] if any(value for _, value in items) else []
    blocks += _usage(made)
    if made:
        rows = [
            (place, str(one.get("fingerprint", "")), str(one.get("made_at", "")), _inputs(one)) for place, one in made.items()
        ]
        header = ("artifact", "fingerprint", "made at (UTC)", "made from")
        blocks.append(Table("Artifacts", header, rows, words=4, summary=f"{len(rows)} finished artifacts and their fingerprints"))
        blocks += [Note(line, warning=True) for line in _stale(made)]
    return blocks


def data(run: RunFiles) -> list[Block]:
    """Return the counts of every source, the reasons for quarantine, and a few of the rows in it."""
    made = run.made("ingest")
    names = ("rows_in", "rows_out", "duplicates", "quarantined")
    rows = [(name, *(f"{one.get('summary', {}).get(key, 0):,}" for key in names)) for name, one in made.items()]
    if not rows:
        return []
    blocks: list[Block] = [
        Table("Rows read = usable + duplicates + quarantined", ("source", "read", "usable", "duplicates", "quarantined"), rows)
    ]
    reasons = [
        (name, reason, REASONS.get(reason, ""), f"{count:,}")
        for name, one in made.items()
        for reason, count in sorted(one.get("summary", {}).get("reasons", {}).items())
    ]
    blocks += _overlap(run)
    if not reasons:
        return [*blocks, Note("No row was quarantined.")]
    blocks.append(Table("Why rows were quarantined", ("source", "reason", "meaning", "rows"), reasons, words=3))
    broken = [row for name in made for row in _quarantined(run, name)]
    header = ("where", "reason", "what exactly", "the row")
    caption = f"The first quarantined rows, at most {QUARANTINED} of each source"
    blocks.append(Table(caption, header, broken, words=4, summary=caption))
    return blocks


def _overlap(run: RunFiles) -> list[Block]:
    """Return which sets share prompts."""
    found = run.json("overlap", "overlap.json")
    if not found:
        return []
    rows = [
        (
            pair["set"],
            pair["within"],
            f"{pair['rows']:,}",
            f"{pair['exact']:,}",
            "–" if pair["near"] is None else f"{pair['near']:,}",
        )
        for pair in found["pairs"]
    ]
    header = ("prompts of", "in", "prompts", "exactly", "nearly")
    return [Table("Prompts that several sets have", header, rows, words=2)] if rows else [Note("No two sets share a prompt.")]


def reproduce(run: RunFiles) -> list[Block]:
    """Return the commands that make this run again, and its resolved configuration."""
    if not run.config:
        return []
    again = shlex.quote(f"run_dir={run.config.get('run_dir', 'run')}-again")
    commands = (
        f"pharmacist doctor {run.command}\n"
        f"pharmacist run {run.command}          # makes what is missing or whose inputs changed\n"
        f"pharmacist run {run.command} {again}  # makes everything anew"
    )
    dumped = yaml.safe_dump(_masked(run.config), sort_keys=False, allow_unicode=True, width=110)
    return [
        Note(
            "Relative paths in the configuration are relative to the folder that the command is run in. Credentials are left out."
        ),
        Code(without_secrets(commands)),
        Code(without_secrets(dumped), "The configuration with every key"),
    ]


def _summary(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what a reader asks first; a key that another version does not have is left out."""

    def at(path: str, root: Any = config) -> Any:
        for key in path.split("."):
            root = root.get(key) if isinstance(root, Mapping) else None
        return root

    def phrase(*parts: tuple[str, Any]) -> str:
        return ", ".join(name.format(value) for name, value in parts if value is not None)

    rule = next((f"{name} {at(f'selection.{name}')}" for name in ("ratio", "count", "threshold") if at(f"selection.{name}")), "")
    yield "base model", phrase(("{}", at("model.path")), ("{}", at("model.dtype")), ("at most {} tokens", at("model.max_length")))
    yield "candidates", ", ".join(at("data.candidates.path") or [])
    yield (
        "selector",
        phrase(
            ("{}", at("selector.mode")),
            ("checkpoints {}", at("selector.checkpoints")),
            ("intensity {}", at("selector.intensity")),
        ),
    )
    yield "scores", ", ".join(at("scoring.scorers") or [])
    scorer = at("selection.scorer")
    yield "selection", phrase(("by {}", arm_of(scorer) if scorer else None), ("{}", rule or None))
    yield (
        "alignment",
        phrase(
            ("{}", ", ".join(at("comparison.defences") or []) or at("alignment.objective")),
            ("{} epochs", at("alignment.train.epochs")),
            ("{} steps", None if at("alignment.train.epochs") else at("alignment.train.steps")),
            ("batch {}", at("alignment.train.batch_size")),
            ("learning rate {}", at("alignment.train.lr")),
            ("{} replayed rows", at("alignment.replay")),
        ),
    )
    for attack in at("attacks") or []:
        yield (
            f"attack {attack.get('name')}",
            phrase(
                ("{} rows", attack.get("rows")),
                ("{:.0%} harmful", attack.get("harmful_share")),
                ("{} epochs", at("train.epochs", attack)),
                ("{} steps", None if at("train.epochs", attack) else at("train.steps", attack)),
                ("learning rate {}", at("train.lr", attack)),
                ("{} adapter", attack.get("adapter")),
            ),
        )
    if at("evaluation"):
        given = at("evaluation.judge")
        judges = [
            one.get("name") or one.get("kind") if isinstance(one, Mapping) else one
            for one in (given if isinstance(given, list) else [given])
        ]
        yield (
            "evaluation",
            phrase(("judge {}", ", ".join(map(str, judges))), ("{} bootstrap draws", at("evaluation.bootstrap_draws"))),
        )
    yield "seeds", phrase(("selector {}", at("seed")), ("alignment {}", at("comparison.seeds")))


def _manifests(run: RunFiles) -> Iterator[tuple[str, dict[str, Any]]]:
    for stage in ("ingest", "selections", "align", "attack"):
        yield from ((f"{stage}/{name}", manifest) for name, manifest in run.made(stage).items())
        if stage == "ingest":
            yield from ((name, manifest) for name in _ONE if (manifest := run.manifest(name)))


def _usage(made: Mapping[str, Mapping[str, Any]]) -> Iterator[Block]:
    """Yield how fast each stage's processes were and what the largest held; of many trainings the mean and the largest."""
    found: dict[str, list[dict[str, float]]] = {}
    for place, manifest in made.items():
        summary = manifest.get("summary") or {}
        usage = summary if "peak_bytes" in summary else summary.get("usage") or {}
        if usage.get("peak_bytes"):
            found.setdefault(place.split("/")[0], []).append(usage)
    rows = []
    for stage, taken in found.items():
        paces = [one["tokens_per_s"] for one in taken if one.get("tokens_per_s")]
        pace = f"{sum(paces) / len(paces):,.0f}" if paces else "–"
        wastes = [one["padding"] for one in taken if one.get("padding") is not None]
        waste = f"{sum(wastes) / len(wastes):.1%}" if wastes else "–"
        rows.append((stage, pace, waste, f"{max(one['peak_bytes'] for one in taken) / 2**30:.2f}"))
    if rows:
        header = ("stage", "tokens/s of a process", "padding", "peak GiB of the largest")
        caption = "What the stages took (memory: of the GPU where one is used, else of the process)"
        yield Table(caption, header, rows, summary="Pace and memory of the stages")


def _inputs(manifest: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in manifest.get("inputs", {}).items())


def _stale(made: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield a sentence for each artifact that was made from another one than now lies beside it."""
    for place, manifest in made.items():
        if place.startswith(("align/", "attack/", "proxy/")):
            continue  # those of other settings stay beside the current ones, and a proxy's are made from a fit of its own
        for name, fingerprint in manifest.get("inputs", {}).items():
            source = name if name in _ONE else f"ingest/{name}"
            if source in made and isinstance(fingerprint, str) and made[source].get("fingerprint") != fingerprint:
                yield f"{place} was made from an earlier {source}; pharmacist run makes it again."


def _quarantined(run: RunFiles, source: str) -> Iterator[tuple[str, str, str, str]]:
    left = QUARANTINED
    for file in matching(run.root / "ingest" / source / "quarantine", "part-*.parquet"):
        with readable(file), opened_parquet(file) as parquet:
            for batch in parquet.iter_batches(batch_size=left):
                for row in batch.to_pylist()[:left]:
                    yield f"{row['source']}:{row['line']}", row["reason"], cut(row["detail"], 200), cut(row["text"], 200)
                    left -= 1
                break
        if not left:
            return


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _masked(value: Any) -> Any:
    """Return plain values in which those of keys that name a secret are ``***``."""
    if isinstance(value, Mapping):
        return {key: "***" if names_a_secret(str(key)) and inner else _masked(inner) for key, inner in value.items()}
    return [_masked(item) for item in value] if isinstance(value, list) else value
