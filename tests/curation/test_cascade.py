"""A cascade of a tiny model behind one that sees nearly the same, against the same model's scores of every row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from pharmacist_ray.config.schema import LoraConfig, ProxyConfig, ResourcesConfig, ScoringConfig, SelectorConfig
from pharmacist_ray.config.scoring import STANDS_FOR
from pharmacist_ray.curation.cascade import FOLDER, score_by_cascade
from pharmacist_ray.curation.combine import rank_sum
from pharmacist_ray.curation.passing import Sample
from pharmacist_ray.curation.score import ScoreReport, score
from pharmacist_ray.curation.scored import find_shards
from pharmacist_ray.curation.scorers.trusted import TrustedSets
from pharmacist_ray.curation.select import Rule, select_ids
from pharmacist_ray.data.rows import iterate_rows, write_rows
from pharmacist_ray.data.schema import Row, row_id, shard_of
from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.models.load import add_lora, load_model, save_adapter
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.storage import write_parquet

SCORERS = ["pharmacist", "low_loss", "keyword", "random"]
BY_MODEL, BY_TEXT = ["pharmacist", "low_loss"], ["keyword", "random_0"]
SELECTOR = SelectorConfig(checkpoints=[20])
ROWS, SHARDS, KEPT = 160, 4, 0.25
SUM = {"pharmacist": 1.0, "keyword": 0.5}


@contextmanager
def silent(what: str) -> Iterator[Callable[..., None]]:
    """Show nothing."""
    yield lambda done, total: None


@dataclass(frozen=True)
class Side:
    """One of the two models, and the selector that was made of it."""

    model: ModelRef
    fit: Path

    def scorer(self) -> Callable[..., ScoreReport]:
        return partial(
            score,
            model=self.model,
            selector=SELECTOR,
            resources=ResourcesConfig(actors=0),
            trusted=TrustedSets({}, 200, 0),
            fit=self.fit,
        )


@pytest.fixture(scope="module")
def sides(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Side, Side]:
    """A selector with a random adapter and directions, and one whose directions are noisy."""

    def side(noise: float) -> Side:
        out = tmp_path_factory.mktemp("fit")
        generator = torch.Generator().manual_seed(0)
        model = add_lora(load_model(model_folder), LoraConfig(r=2), seed=0)
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        for parameter in parameters.values():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        save_adapter(model, out / "warmup" / "step-000020")
        (out / "directions").mkdir()
        directions = {name: torch.randn(2, *one.shape, generator=generator) for name, one in parameters.items()}
        directions = {name: one + noise * torch.randn(one.shape, generator=generator) for name, one in directions.items()}
        save_file(directions, out / "directions" / "step-000020.safetensors")
        return Side(ModelRef(str(model_folder), template="plain", max_length=32), out)

    return side(0), side(0.4)


@pytest.fixture(scope="module")
def candidates(rows_of: Callable[..., list[Row]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in shards, one of them empty, and a row that no model can take: its prompt is longer than the model."""
    folder = tmp_path_factory.mktemp("candidates")
    prompt = " ".join(["w1"] * 40)
    long = Row(row_id(prompt, "w2"), prompt, "w2", source="made:long", raw='{"prompt": "long"}')
    rows = [*rows_of(ROWS - 1, seed=7), long]
    for shard in range(SHARDS):
        write_rows([row for row in rows if shard_of(row.id, SHARDS) == shard], folder / "rows" / f"part-{shard:05d}.parquet")
    write_rows([], folder / "rows" / f"part-{SHARDS:05d}.parquet")
    return folder


@pytest.fixture(scope="module")
def whole(sides: tuple[Side, Side], candidates: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What both models make of every row: folders of score files."""
    folders = []
    for side in sides:
        out = tmp_path_factory.mktemp("whole") / "rows"
        scoring = ScoringConfig(scorers=SCORERS, random_draws=1, tokens_per_batch=64)
        side.scorer()(scoring=scoring, candidates=candidates / "rows", out=out)
        folders.append(out)
    return folders[0], folders[1]


@pytest.fixture(scope="module")
def cascade(
    sides: tuple[Side, Side], candidates: Path, whole: tuple[Path, Path]
) -> Callable[..., tuple[ScoreReport, dict[str, Any]]]:
    """Return what runs a cascade into a folder: cascade(out, miss=.2, …)."""

    def run(out: Path, rules: dict[str, Rule] | None = None, scorers: list[str] = SCORERS, **proxy: Any) -> Any:
        settings = {"layers": 1, "miss": 0.2, "sample": 60, **proxy}
        return score_by_cascade(
            sides[0].scorer(),
            scoring=ScoringConfig(scorers=scorers, random_draws=1, tokens_per_batch=64, proxy=settings),  # type: ignore[arg-type]
            selector=SELECTOR,
            candidates=candidates,
            proxy=whole[1],
            rules=rules or {"pharmacist": Rule("pharmacist", ratio=KEPT)},
            planted=None,
            out=out / "rows",
            progress=silent,
        )

    return run


@pytest.fixture(scope="module")
def done(cascade: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ScoreReport, dict[str, Any]]:
    """A cascade that leaves rows out."""
    out = tmp_path_factory.mktemp("cascade")
    return out, *cascade(out)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Column → id → score; no id comes twice."""
    table = pq.read_table(folder)
    ids = table.column("id").to_pylist()
    assert len(set(ids)) == len(ids)
    return {name: dict(zip(ids, table.column(name).to_pylist(), strict=True)) for name in table.column_names[1:]}


def best(values: dict[str, Any], count: int) -> set[str]:
    known = {id: value for id, value in values.items() if value is not None}
    return set(sorted(known, key=lambda id: (-known[id], id))[:count])


def test_a_row_that_the_model_saw_has_its_scores_and_one_that_it_never_saw_says_so(
    done: tuple[Path, ScoreReport, dict[str, Any]], whole: tuple[Path, Path], candidates: Path
) -> None:
    out, report, facts = done
    for file in sorted((candidates / "rows").iterdir()):
        table = pq.read_table(out / "rows" / file.name)
        assert table.column_names == ["id", *BY_MODEL, *BY_TEXT, STANDS_FOR]
        assert table.column("id").to_pylist() == [row.id for row in iterate_rows(file)]
    got, want = read(out / "rows"), read(whole[0])
    stands = got.pop(STANDS_FOR)
    (broken,) = [id for id, value in want["random_0"].items() if value is None]
    seen = {id for id, count in stands.items() if count}
    assert len(seen) == facts["seen"] < facts["candidates"] == report.rows == ROWS
    for column, values in want.items():
        for id, value in values.items():
            expected = value if column in BY_TEXT or id in seen else None
            if id != broken or id in seen:
                assert got[column][id] == (expected if expected is None else pytest.approx(expected, rel=1e-4, abs=1e-5))
    assert broken in seen  # no proxy could rule it out
    assert all(got[column][broken] is None for column in got)
    assert sum(stands.values()) == pytest.approx(ROWS)
    assert {count for count in stands.values() if count not in (0, 1)} == {max(stands.values())}


def test_the_counts_and_the_quarantine_are_those_of_one_pass(
    done: tuple[Path, ScoreReport, dict[str, Any]], whole: tuple[Path, Path]
) -> None:
    out, report, _ = done
    assert (report.rows, report.shards, report.columns, report.quarantined) == (ROWS, SHARDS + 1, BY_MODEL + BY_TEXT, 1)
    assert report.reasons == {"scorer_error": 1}
    assert pq.read_table(out / "quarantine").to_pylist() == pq.read_table(whole[0].with_name("quarantine")).to_pylist()


def ids_of(scores: Path, candidates: Path, rule: Rule) -> set[str]:
    return {id for table in select_ids(scores, candidates, rule) for id in table["id"].to_pylist()}


def test_what_is_lost_of_the_models_own_top_is_what_the_interval_says(
    done: tuple[Path, ScoreReport, dict[str, Any]], whole: tuple[Path, Path], candidates: Path
) -> None:
    out, _, facts = done
    stated, wanted = facts["arms"]["pharmacist"], round(KEPT * ROWS)
    own = best(read(whole[0])["pharmacist"], wanted)
    seen = {id for id, count in read(out / "rows")[STANDS_FOR].items() if count}
    assert stated["wanted"] == wanted
    assert stated["low"] <= len(own - seen) / wanted <= stated["high"] < 1
    kept = ids_of(out / "rows", candidates, Rule("pharmacist", ratio=KEPT))
    assert own & seen <= kept <= seen  # none that the model never saw, and all of its own top that it did see
    assert len(kept) == wanted


def test_where_everything_is_passed_on_selections_are_the_models_own(
    cascade: Callable[..., Any], whole: tuple[Path, Path], candidates: Path, tmp_path: Path
) -> None:
    rules = {
        "pharmacist": Rule("pharmacist", ratio=KEPT),
        "sum": Rule("sum", count=31, weights=SUM),
        "turns": Rule("turns", ratio=0.5, turns=("pharmacist", "low_loss")),
    }
    _, facts = cascade(tmp_path, rules, miss=0.001)
    assert (facts["seen"], facts["passed_on"]) == (ROWS, ROWS)
    assert set(read(tmp_path / "rows")[STANDS_FOR].values()) == {1.0}
    for name, rule in rules.items():
        assert ids_of(tmp_path / "rows", candidates, rule) == ids_of(whole[0], candidates, rule)
        stated = facts["arms"][name]
        assert (stated["estimate"], stated["low"], stated["high"], stated["enough"]) == (0, 0, 0, False)


def test_several_arms_pass_on_what_any_of_them_asks_for(
    cascade: Callable[..., Any], done: tuple[Path, ScoreReport, dict[str, Any]], tmp_path: Path
) -> None:
    rules = {"pharmacist": Rule("pharmacist", ratio=KEPT), "low_loss": Rule("low_loss", ratio=KEPT)}
    _, facts = cascade(tmp_path, rules)
    both, alone = (read(folder / "rows")[STANDS_FOR] for folder in (tmp_path, done[0]))
    assert {id for id, count in alone.items() if count} < {id for id, count in both.items() if count}
    assert list(facts["arms"]) == ["pharmacist", "low_loss"]


def test_ranks_among_seen_rows_are_ranks_among_all(
    done: tuple[Path, ScoreReport, dict[str, Any]], whole: tuple[Path, Path], candidates: Path
) -> None:
    """The mean rank of the rows that were seen is far above a half; what they stand for is not."""
    out, *_ = done
    shards, ranking = find_shards(out / "rows", candidates, "sum", weights=SUM)
    assert ranking.partial
    own = rank_sum([pq.read_table(file) for file in sorted(whole[0].glob("*.parquet"))], SUM)
    errors, plain = [], []
    seen_alone = rank_sum([pq.read_table(shard.scores) for shard in shards], SUM)
    for shard in shards:
        table, true = pq.read_table(shard.scores), own.of(pq.read_table(whole[0] / shard.scores.name))
        known = np.asarray(table[STANDS_FOR]) > 0
        errors += list((np.asarray(ranking.scores(shard.scores)["score"]) - true)[known])
        plain += list((seen_alone.of(table) - true)[known])
    assert np.nanmean(np.abs(errors)) < np.nanmean(np.abs(plain)) / 2
    assert abs(np.nanmean(errors)) < 0.05


@pytest.mark.parametrize("lost", [["rows"], ["rows", f"{FOLDER}/passed/scores"], ["rows", f"{FOLDER}/passed/rows"]])
def test_what_was_lost_of_an_unfinished_cascade_is_made_again_and_nothing_else(
    cascade: Callable[..., Any], done: tuple[Path, ScoreReport, dict[str, Any]], tmp_path: Path, lost: list[str]
) -> None:
    out = shutil.copytree(done[0], tmp_path / "scores")
    for folder in lost:
        (out / folder / "part-00002.parquet").unlink()
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    report, facts = cascade(out)
    assert read(out / "rows") == read(done[0] / "rows")
    assert (facts, report.rows, report.reasons) == (done[2], done[1].rows, done[1].reasons)
    again = {file.name for file, at in before.items() if file.exists() and file.stat().st_mtime_ns != at}
    assert again <= {"part-00002.parquet"}  # what is there is not written again


def test_the_cuts_stay_though_scores_of_the_sample_are_made_again(
    cascade: Callable[..., Any], done: tuple[Path, ScoreReport, dict[str, Any]], tmp_path: Path
) -> None:
    out = shutil.copytree(done[0], tmp_path / "scores")
    cuts = json.loads((out / FOLDER / "cuts.json").read_text())
    key = bytes.fromhex(cuts["pharmacist"])
    assert len(key) == 40
    (out / FOLDER / "sample" / "scores" / "part-00001.parquet").unlink()
    (out / "rows" / "part-00001.parquet").unlink()
    cascade(out)
    assert json.loads((out / FOLDER / "cuts.json").read_text()) == cuts
    assert read(out / "rows") == read(done[0] / "rows")


def test_a_score_file_that_lacks_scores_is_told_from_rows_that_were_never_seen(
    cascade: Callable[..., Any], done: tuple[Path, ScoreReport, dict[str, Any]], tmp_path: Path
) -> None:
    out = shutil.copytree(done[0], tmp_path / "scores")
    file = out / "rows" / "part-00000.parquet"
    table = pq.read_table(file)
    place = int(np.flatnonzero(np.asarray(table[STANDS_FOR]))[0])

    def without(column: str) -> pa.Table:
        values = table[column].to_pylist()
        values[place] = None
        return table.set_column(table.column_names.index(column), column, pa.array(values, pa.float64()))

    for column in ("pharmacist", "keyword"):
        write_parquet(without(column), file)
        with pytest.raises(
            ArtifactError,
            match=rf"^{file} lacks scores \({column}\) besides those of \d+ rows that the model never saw and of \d quarantined ones; "
            "remove it and score again$",
        ):
            cascade(out)
    stands = table[STANDS_FOR].to_pylist()
    stands[place] = 0.0
    unseen = table.set_column(table.column_names.index(STANDS_FOR), STANDS_FOR, pa.array(stands))
    for column in BY_MODEL:
        values = unseen[column].to_pylist()
        values[place] = None
        unseen = unseen.set_column(unseen.column_names.index(column), column, pa.array(values, pa.float64()))
    write_parquet(unseen, file)
    seen = done[2]["seen"]
    with pytest.raises(
        ArtifactError,
        match=rf"^{out / 'rows'} has {ROWS} scores for {ROWS} candidates, {seen - 1} of them of rows that the model saw in the place of "
        rf"{seen}, and 1 empty ones for 1 quarantined rows; remove the folder {out} and score again$",
    ):
        cascade(out)


def test_the_proxys_scores_have_to_be_of_these_candidates(
    sides: tuple[Side, Side], candidates: Path, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    proxy = shutil.copytree(whole[1], tmp_path / "proxy")
    (proxy / "part-00001.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"do not have the same shards: part-00001\.parquet is in one only; score again$"):
        score_by_cascade(
            sides[0].scorer(),
            scoring=ScoringConfig(scorers=["low_loss"], proxy=ProxyConfig(layers=1, sample=10)),
            selector=SELECTOR,
            candidates=candidates,
            proxy=proxy,
            rules={"low_loss": Rule("low_loss", ratio=KEPT)},
            planted=None,
            out=tmp_path / "rows",
            progress=silent,
        )


def test_a_sample_is_drawn_by_id_and_seed_alone() -> None:
    ids = pa.array([row_id(str(number), "") for number in range(4000)])
    drawn = Sample(3, 0.25).has(ids)
    assert drawn.mean() == pytest.approx(0.25, abs=0.03)
    assert (Sample(3, 0.25).has(ids[::-1]) == drawn[::-1]).all()
    assert (drawn <= Sample(3, 0.5).has(ids)).all()  # a larger sample holds a smaller one
    assert 0.2 < (drawn == Sample(4, 0.25).has(ids)).mean() < 0.75
