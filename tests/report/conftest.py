"""A small run on disk: selections by the real stage function, everything else written in the form that the stages write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pharmacist_ray.curation.select import Rule, write_selection
from pharmacist_ray.data.quarantine import QUARANTINE_SCHEMA
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.data.schema import Row, row_id, shard_of
from pharmacist_ray.search.worst import bounded_worst, budget_curve, trials_table
from pharmacist_ray.storage import write_parquet, write_text

HOSTILE = (
    "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'><svg onload=window.hit=3></svg></style></title>"
    '"><iframe srcdoc="<script>parent.hit = 4</script>"></iframe><a href="javascript:window.hit=5">x</a>'
    "\x1b[31mred\x1b[0m \x9b2J \u202egnp.exe\u202c \u2066x\u2069 zero\u200bwidth {{ 7 * 7 }} {% raw %} $x^{$ &lt;b&gt; http://192.0.2.1/x.png"
)
SHARDS = 3
METRICS = ("harmful_score", "coherent_refusal", "incoherent_harmful", "accuracy_correct", "helpfulness", "over_refusal")


class MadeRun:
    """A run directory that grows stage by stage."""

    def __init__(self, root: Path, hostile: str = "") -> None:
        self.root, self.hostile = root, hostile
        self.rng = np.random.default_rng(7)

    def manifest(self, place: str, summary: Any = None, **inputs: str) -> dict[str, Any]:
        found = self.root / place / "manifest.json"
        kept = json.loads(found.read_text()) if found.exists() else {}
        made = kept | {
            "stage": place.partition("/")[0], "fingerprint": f"f-{place}", "inputs": inputs, "config": {},
            "made_at": "2026-01-01T00:00:00+00:00", "python": "3.11.7", "summary": summary or {},
            "versions": {"ray": "2.60.0", "torch": None}, "machine": {"cpu": f"one {self.hostile}", "gpus": ["H1", "H2"]},
        }  # fmt: skip
        write_text(json.dumps(made), found)
        return made

    def config(self, **more: Any) -> None:
        config = {
            "run_dir": str(self.root),
            "seed": 0,
            "model": {
                "path": "s3://me:hunter2@bucket/base?secret_key=abc123&region=eu",
                "dtype": "float32",
                "hub_token": "tok-99",
            },
            "data": {"candidates": {"path": [f"data/{self.hostile}.jsonl"]}},
            "scoring": {"scorers": ["pharmacist", "random"]},
            "selection": {"scorer": "pharmacist", "ratio": 0.4},
            "comparison": {"selections": ["all", "random", "pharmacist"], "seeds": [0, 1]},
            **more,
        }
        write_text(yaml.safe_dump(config), self.root / "config.yaml")

    def ingest(self, rows: int = 60) -> None:
        def row(number: int) -> Row:
            prompt, response = f"prompt {number} {self.hostile}", f"answer {number} {self.hostile}"
            category = f"kind-{number % 3}{self.hostile}"
            source = f"{self.hostile}file:{number}"
            return Row(
                row_id(prompt, response), prompt, response, category=category, source=source, raw=json.dumps({"n": number})
            )

        shards: list[list[Row]] = [[] for _ in range(SHARDS)]
        for one in map(row, range(rows)):
            shards[shard_of(one.id, SHARDS)].append(one)
        for number, some in enumerate(shards):
            write_rows(some, self.root / "ingest" / "candidates" / "rows" / f"part-{number:05d}.parquet")
        quarantined = {
            "source": "file",
            "line": 3,
            "reason": "bad_json",
            "detail": self.hostile or "what",
            "text": self.hostile or "{",
        }
        table = pa.Table.from_pylist([quarantined] * 5, schema=QUARANTINE_SCHEMA)
        write_parquet(table, self.root / "ingest" / "candidates" / "quarantine" / "part-00000.parquet")
        counts = {"rows_in": rows + 7, "rows_out": rows, "duplicates": 2, "quarantined": 5, "reasons": {"bad_json": 5}}
        self.manifest("ingest/candidates", counts)

    def score(self) -> None:
        for number in range(SHARDS):
            name = f"part-{number:05d}.parquet"
            ids = pq.read_table(self.root / "ingest" / "candidates" / "rows" / name)["id"]
            scores = {name: self.rng.normal(size=len(ids)) for name in ("pharmacist", "random_0")}
            scores["pharmacist"][0] = np.nan
            write_parquet(pa.table({"id": ids, **scores}), self.root / "scores" / "rows" / name)
        self.manifest("scores", candidates="f-ingest/candidates")

    def select(self) -> None:
        rules = {"pharmacist": Rule("pharmacist", ratio=0.4), "all": Rule("random_0", ratio=1.0)}
        for arm, rule in (rules | {f"random_{draw}": Rule("random_0", ratio=0.4) for draw in range(2)}).items():
            folder = self.root / "selections" / arm
            write_selection(self.root / "ingest" / "candidates", self.root / "scores" / "rows", rule, folder, provenance={})
            self.manifest(f"selections/{arm}", scores="f-scores")

    def history(self, folder: Path, steps: int = 60, start: float = 2.0) -> None:
        lines = [
            {"step": step, "loss": start / step, "grad_norm": float("nan") if step == 5 else start, "lr": 0.1}
            for step in range(1, steps + 1)
        ]
        write_text("\n".join(map(json.dumps, lines)) + "\n", folder / "history.jsonl")

    def train(self) -> None:
        self.history(self.root / "fit" / "warmup")
        self.history(self.root / "fit" / "reference")
        self.manifest("fit", {"usage": {"peak_bytes": 2**29}}, candidates="f-ingest/candidates")
        for arm in ("all", "random_0", "random_1", "pharmacist"):
            for seed in (0, 1):
                self.model("align", f"{arm}.sft.s{seed}-0123abcd", 2.0 + seed, selection=f"f-selections/{arm}")
                self.model(
                    "attack", f"{arm}.sft.s{seed}.strong-0123abcd", 2.0 + seed, aligned=f"f-align/{arm}.sft.s{seed}-0123abcd"
                )

    def model(self, stage: str, name: str, start: float, **inputs: str) -> None:
        self.history(self.root / stage / name / "run", start=start)
        self.manifest(f"{stage}/{name}", {"tokens_per_s": 1000 * start, "peak_bytes": int(start * 2**30)}, **inputs)

    def evaluate(self) -> None:
        def metric(value: float) -> dict[str, Any]:
            return {"estimate": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1), "n": 10, "unscored": 0}

        rows = []
        for at, arm in enumerate(("all", "random", f"pharmacist{self.hostile}")):
            for attack in (None, "strong", "weak"):
                metrics = {name: metric(0.2 + 0.1 * at + 0.05 * place) for place, name in enumerate(METRICS)}
                minus = {"all": {name: metric(0.1) for name in METRICS}} if arm not in ("all", "random") else {}
                rows.append(
                    {"selection": arm, "defence": "sft", "attack": attack, "runs": 2, "kept": 24, "align_seconds": 1.25,
                     "metrics": metrics, "minus": minus}
                )  # fmt: skip
        write_text(json.dumps(rows), self.root / "evaluation" / "table.json")
        self.manifest("evaluation")

    def search(self, trials: int = 24) -> None:
        rows = []
        for number in range(trials):
            ratio, intensity = (number % 4 + 1) / 5, 10.0 ** -(number % 3)
            failed = number % 8 == 7
            hs = round(0.1 + 0.5 * ratio + 0.02 * number % 0.3, 3)
            row: dict[str, Any] = {"trial": f"t{number:02d}", "status": "failed" if failed else "finished"}
            row |= {"error": f"boom {self.hostile}" if failed else "", "fingerprint": "f"}
            row |= {"param.selection.ratio": json.dumps(ratio), "param.selector.intensity": json.dumps(intensity)}
            row |= {"param.alignment.objective": json.dumps(f"sft{self.hostile}" if number % 2 else "vaccine")}
            for name, value in (("worst_hs", hs), ("task_accuracy", 1 - ratio / 2), ("over_refusal", 0.05)):
                shown = None if failed else value
                row |= {name: shown, f"{name}_low": shown and shown - 0.05, f"{name}_high": shown and shown + 0.05}
            row |= {"mean_hs": None if failed else hs / 2, "align_seconds": 3.5, "front": number in (0, 1, 2)}
            row["attacks"] = json.dumps({"strong": hs})
            rows.append(row)
        write_parquet(pa.Table.from_pylist(rows), self.root / "search" / "trials.parquet")
        recommendation = {
            "trial": "t01", "reason": f"lowest harmful score within 0.02 of the best accuracy {self.hostile}",
            "config_path": "search/t01.yaml", "command": "pharmacist run --config search/t01.yaml",
        }  # fmt: skip
        write_text(json.dumps(recommendation), self.root / "search" / "recommendation.json")

    def redteam(self) -> None:
        records = [
            {
                "trial": f"r{number:02d}", "status": "failed" if number == 5 else "finished", "error": f"boom {self.hostile}",
                "fingerprint": "f", "selection": arm, "defence": "sft", "samples": 100 * (number + 1),
                "parameters": {"train.lr": 10.0 ** -(number + 2), "adapter": f"fresh{self.hostile}"},
                **({} if number == 5 else {"hs": 0.2 + 0.1 * number, "hs_low": 0.1, "hs_high": 0.9, "lost": 0.06 * number}),
                "hs_before": 0.05,
                **dict.fromkeys(("accuracy", "accuracy_before", "helpful", "helpful_before"), 0.9),
                "accuracy_lost": 0.0, "helpful_lost": 0.06 * number,
            }
            for arm in ("all", "pharmacist") for number in range(6)
        ]  # fmt: skip
        arms = []
        for arm in ("all", "pharmacist"):
            mine = [record for record in records if record["selection"] == arm]
            worst = None if arm == "all" else bounded_worst(mine, 0.2)
            counted = {"trials": 6, "finished": 5, "within": 4 if worst else 0, "hs_before": 0.05, "unbounded_hs": 0.6}
            curve = budget_curve(mine, 0.2) if worst else []
            arms.append({"selection": arm, "defence": "sft", "worst": worst, "attack": None, "curve": curve, **counted})
        write_text(
            json.dumps({"bound": 0.2, "trials": 6, "attack": "strong", "arms": arms}), self.root / "redteam" / "redteam.json"
        )
        write_parquet(trials_table(records, 0.2), self.root / "redteam" / "trials.parquet")

    def everything(self) -> MadeRun:
        self.config()
        for stage in (self.ingest, self.score, self.select, self.train, self.evaluate, self.search, self.redteam):
            stage()
        return self


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., MadeRun]:
    """Return a maker of run directories: make_run(hostile=True) has hostile text wherever text can stand."""

    def make(hostile: bool = False) -> MadeRun:
        return MadeRun(tmp_path_factory.mktemp("made") / "run", HOSTILE if hostile else "")

    return make
