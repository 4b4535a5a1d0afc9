from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from pharmacist_ray.config.schema import CoverageConfig, LoraConfig, ResourcesConfig, ScoringConfig, SelectorConfig
from pharmacist_ray.curation import score as score_module
from pharmacist_ray.curation.fit import DIRECTIONS
from pharmacist_ray.curation.score import ScoreReport, ShardScorer, score
from pharmacist_ray.curation.scorers import columns_of
from pharmacist_ray.curation.scorers.signals import ProbeSpec
from pharmacist_ray.curation.scorers.trusted import TrustedSets
from pharmacist_ray.data.rows import iterate_rows, write_rows
from pharmacist_ray.data.schema import Row, shard_of, uniform
from pharmacist_ray.errors import ArtifactError, ConfigError, ResourceError
from pharmacist_ray.models.load import add_lora, load_model, save_adapter
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.storage import write_parquet

SCORERS = ["pharmacist", "loss_gap", "less", "low_loss", "high_loss", "ifd", "grad_norm", "random"]
NONE = TrustedSets({}, 200, 0)
COLUMNS = ["id", *SCORERS[:-1], "random_0", "random_1", "random_2"]
SELECTOR = SelectorConfig(checkpoints=[20])
Table = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def fitted(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A selector's folder as `fit` leaves it, with random adapters and directions."""
    out = tmp_path_factory.mktemp("fit")
    generator = torch.Generator().manual_seed(0)
    for place in ("warmup/step-000020", "reference/adapter"):
        model = add_lora(load_model(model_folder), LoraConfig(r=2), seed=0)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for parameter in parameters.values():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        save_adapter(model, out / place)
    (out / "directions").mkdir()
    directions = {name: torch.randn(2, *p.shape, generator=generator) for name, p in parameters.items()}
    save_file(directions, out / "directions" / "step-000020.safetensors")
    return out


def write_shards(rows: list[Row], folder: Path, shards: int) -> Path:
    """Rows in shards by their ids; one more shard is empty."""
    for shard in range(shards):
        write_rows([row for row in rows if shard_of(row.id, shards) == shard], folder / f"part-{shard:05d}.parquet")
    write_rows([], folder / f"part-{shards:05d}.parquet")
    return folder


@pytest.fixture(scope="module")
def rows(rows_of: Callable[..., list[Row]]) -> list[Row]:
    return rows_of(40, seed=7)


@pytest.fixture(scope="module")
def candidates(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(rows, tmp_path_factory.mktemp("candidates"), 5)


@pytest.fixture(scope="module")
def run_score(model_folder: Path, fitted: Path) -> Callable[..., ScoreReport]:
    def run(
        candidates: Path, out: Path, scorers: list[str] = SCORERS, actors: int = 1, together: int = 1, **changed: Any
    ) -> ScoreReport:
        settings: dict[str, Any] = {"fit": fitted, "selector": SELECTOR, "progress": None}
        settings.update({name: changed.pop(name) for name in list(changed) if name in settings})
        return score(
            model=ModelRef(str(model_folder), template="plain", max_length=32),
            scoring=ScoringConfig(**{"scorers": scorers, "tokens_per_batch": 64, **changed}),
            resources=ResourcesConfig(actors=actors, workers_per_actor=together, cpus_per_worker=0.5),
            candidates=candidates,
            trusted=NONE,
            out=out,
            **settings,
        )

    return run


@pytest.fixture(scope="module")
def score_here(model_folder: Path, fitted: Path) -> Callable[..., Table]:
    """Score shards in this process, with the actor's own code; what Ray adds is tested apart."""

    def run(
        candidates: Path,
        out: Path,
        mode: str = "one_shot",
        fit: Path = fitted,
        cosine: bool = False,
        coverage: CoverageConfig = SELECTOR.coverage,
        **changed: Any,
    ) -> Table:
        scoring = ScoringConfig(**{"scorers": SCORERS, "tokens_per_batch": 64, **changed})
        spec = ProbeSpec(
            ModelRef(str(model_folder), template="plain", max_length=32), str(fit), ("step-000020",), DIRECTIONS,
            scoring.method, scoring.tokens_per_batch, cosine, groups=coverage.groups if "coverage" in scoring.scorers else 0,
        )  # fmt: skip
        scorer = ShardScorer(spec, scoring, SelectorConfig(mode=mode, coverage=coverage), str(out), threads=1, trusted=NONE)
        for file in sorted(candidates.glob("*.parquet")):
            scorer({"shard": str(file)})
        return read(out)

    return run


@pytest.fixture(scope="module")
def scored(ray_local: None, candidates: Path, run_score: Callable[..., ScoreReport], tmp_path_factory: Any) -> Path:
    """All scores, by one actor."""
    out = tmp_path_factory.mktemp("scored") / "rows"
    seen: list[tuple[int, int]] = []
    report = run_score(candidates, out, progress=lambda done, total: seen.append((done, total)))
    assert (report.rows, report.shards, report.columns) == (40, 6, COLUMNS[1:])
    assert seen == [(done, 6) for done in range(7)]
    return out


def read(folder: Path) -> Table:
    """Column → id → score; no id comes twice."""
    table = pq.read_table(folder)
    ids = table.column("id").to_pylist()
    assert len(set(ids)) == len(ids)
    return {name: dict(zip(ids, table.column(name).to_pylist(), strict=True)) for name in table.column_names[1:]}


def assert_same(got: Table, want: Table, rtol: float = 1e-5) -> None:
    """The same ids, the same scores up to rounding, and so the same rows on top."""
    assert list(got) == list(want)
    for name, values in want.items():
        assert got[name].keys() == values.keys()
        size = max(map(abs, values.values()))
        for id, value in values.items():
            assert got[name][id] == pytest.approx(value, rel=rtol, abs=rtol * size), (name, id)
        for count in (5, 16, 30):
            assert top(got[name], count) == top(values, count), name


def top(values: dict[str, float], count: int) -> set[str]:
    return set(sorted(values, key=lambda id: (-values[id], id))[:count])


def test_every_candidate_gets_one_score_of_each_kind_in_the_file_of_its_shard(
    scored: Path, candidates: Path, rows: list[Row]
) -> None:
    names = [file.name for file in sorted(candidates.iterdir())]
    assert [file.name for file in sorted(scored.iterdir())] == names  # nothing half-written is left either
    for name in names:
        table = pq.read_table(scored / name)
        assert table.column_names == COLUMNS
        assert table.column("id").to_pylist() == [row.id for row in iterate_rows(candidates / name)]
        assert [table.schema.field(name).type for name in COLUMNS] == [pa.string()] + [pa.float64()] * 10
    table = read(scored)
    assert all(values.keys() == {row.id for row in rows} for values in table.values())
    assert np.isfinite([list(values.values()) for values in table.values()]).all()


def test_a_rerun_computes_and_appends_nothing(
    scored: Path, candidates: Path, run_score: Callable[..., ScoreReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is missing")

    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in scored.iterdir()}
    monkeypatch.setattr(score_module, "on_actors", never)
    seen: list[tuple[int, int]] = []
    report = run_score(candidates, scored, progress=lambda done, total: seen.append((done, total)))
    assert (report.rows, report.shards, report.columns) == (40, 6, COLUMNS[1:])
    assert seen == [(6, 6)]
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in scored.iterdir()} == before


def test_a_lost_part_alone_is_made_anew_with_the_same_bytes(
    scored: Path, candidates: Path, run_score: Callable[..., ScoreReport]
) -> None:
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in scored.iterdir()}
    lost = "part-00002.parquet"
    (scored / lost).unlink()
    seen: list[tuple[int, int]] = []
    report = run_score(candidates, scored, progress=lambda done, total: seen.append((done, total)))
    assert (report.rows, seen) == (40, [(5, 6), (6, 6)])
    after = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in scored.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {lost}
    assert after[lost][1] == before[lost][1]


def test_actors_shards_batches_and_order_change_no_score(
    scored: Path, rows: list[Row], run_score: Callable[..., ScoreReport], tmp_path: Path
) -> None:
    shuffled = [rows[index] for index in torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()]
    write_shards(shuffled, tmp_path / "candidates", 3)
    run_score(tmp_path / "candidates", tmp_path / "scores", actors=2, tokens_per_batch=500)
    assert_same(read(tmp_path / "scores"), read(scored))


@pytest.mark.parametrize(
    ("groups", "workers", "method"),
    [
        (1, 2, "hooks"),
        pytest.param(2, 2, "ghost", marks=pytest.mark.slow),
        pytest.param(1, 4, "hooks", marks=pytest.mark.slow),
    ],
)
def test_workers_who_hold_the_model_together_find_the_scores_of_one_who_holds_it_alone(
    scored: Path,
    candidates: Path,
    run_score: Callable[..., ScoreReport],
    tmp_path: Path,
    groups: int,
    workers: int,
    method: str,
) -> None:
    seen: list[tuple[int, int]] = []
    out, scorers = tmp_path / "rows", SCORERS if method == "hooks" else ["pharmacist", "less", "low_loss"]
    report = run_score(
        candidates, out, scorers, actors=groups, together=workers, method=method,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert (report.rows, report.shards) == (40, 6)
    assert seen == [(done, 6) for done in range(7)]
    assert report.usage["tokens_per_s"] > 0
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in scored.iterdir())
    got = read(out)
    assert list(got) == report.columns
    assert_same(got, {name: values for name, values in read(scored).items() if name in got}, rtol=1e-4)


def test_without_actors_this_process_writes_the_same_files(
    scored: Path, candidates: Path, run_score: Callable[..., ScoreReport], tmp_path: Path
) -> None:
    out = tmp_path / "rows"
    seen: list[tuple[int, int]] = []
    report = run_score(candidates, out, actors=0, progress=lambda done, total: seen.append((done, total)))
    assert (report.rows, report.shards, report.columns) == (40, 6, COLUMNS[1:])
    assert seen == [(done, 6) for done in range(7)]
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {file.name: file.read_bytes() for file in scored.iterdir()}


@pytest.mark.parametrize("shards", [1, 9])
@pytest.mark.parametrize("tokens_per_batch", [1, 100, 100_000])
def test_shards_and_batches_change_no_score(
    scored: Path, rows: list[Row], score_here: Callable[..., Table], tmp_path: Path, shards: int, tokens_per_batch: int
) -> None:
    folder = write_shards(rows, tmp_path / "candidates", shards)
    assert_same(score_here(folder, tmp_path / "scores", tokens_per_batch=tokens_per_batch), read(scored))


def test_rows_in_another_order_within_a_shard_keep_their_scores(
    scored: Path, candidates: Path, score_here: Callable[..., Table], tmp_path: Path
) -> None:
    for file in candidates.glob("*.parquet"):
        table = pq.read_table(file)
        write_parquet(table.sort_by([("id", "descending")]), tmp_path / "reversed" / file.name)
    assert_same(score_here(tmp_path / "reversed", tmp_path / "scores"), read(scored))


def test_a_row_that_is_gone_moves_no_other_rows_score(
    scored: Path, rows: list[Row], score_here: Callable[..., Table], tmp_path: Path
) -> None:
    folder = write_shards(rows[:10] + rows[13:], tmp_path / "candidates", 5)
    left = {row.id for row in rows[:10] + rows[13:]}
    want = {name: {id: value for id, value in values.items() if id in left} for name, values in read(scored).items()}
    assert_same(score_here(folder, tmp_path / "scores"), want)


@pytest.mark.parametrize(("method", "tolerance"), [("ghost", 1e-4), ("difference", 2e-2)])
def test_methods_agree(
    scored: Path, candidates: Path, score_here: Callable[..., Table], tmp_path: Path, method: str, tolerance: float
) -> None:
    got, want = score_here(candidates, tmp_path, scorers=["pharmacist", "less"], method=method), read(scored)
    for name in ("pharmacist", "less"):
        a, b = (np.array([values[id] for id in sorted(values)]) for values in (got[name], want[name]))
        assert np.linalg.norm(a - b) / np.linalg.norm(b) < tolerance
        assert len(top(got[name], 16) & top(want[name], 16)) >= (16 if method == "ghost" else 15)


def test_cosine_divides_by_the_gradients_norm(
    scored: Path, candidates: Path, score_here: Callable[..., Table], tmp_path: Path
) -> None:
    want, got = read(scored), score_here(candidates, tmp_path, cosine=True)
    for name in ("pharmacist", "less"):
        quotient = {id: value / want["grad_norm"][id] for id, value in want[name].items()}
        assert [got[name][id] for id in quotient] == pytest.approx(list(quotient.values()), rel=1e-5)
    assert got["grad_norm"] == want["grad_norm"]


def test_random_scores_depend_on_id_and_seed_alone_and_load_no_model(
    scored: Path, rows: list[Row], score_here: Callable[..., Table], tmp_path: Path
) -> None:
    folder = write_shards(rows[::-3], tmp_path / "candidates", 2)
    for seed in (0, 5):
        got = score_here(folder, tmp_path / f"{seed}", scorers=["random"], seed=seed, random_draws=2, fit=tmp_path / "no fit")
        assert got == {f"random_{draw}": {row.id: uniform(row.id, seed + draw) for row in rows[::-3]} for draw in (0, 1)}
    want = read(scored)["random_1"]
    assert {row.id: want[row.id] for row in rows} == {row.id: uniform(row.id, 1) for row in rows}
    assert len({*want.values()}) == 40


def test_the_iterative_mode_gives_the_learnt_logits(
    rows: list[Row], candidates: Path, fitted: Path, score_here: Callable[..., Table], tmp_path: Path
) -> None:
    (tmp_path / "fit").mkdir()
    for name in ("warmup", "directions"):
        (tmp_path / "fit" / name).symlink_to(fitted / name)
    options: dict[str, Any] = {"mode": "iterative", "fit": tmp_path / "fit", "scorers": ["pharmacist", "low_loss"]}
    file = tmp_path / "fit" / "logits.parquet"
    with pytest.raises(
        ArtifactError, match=rf"^the selector is incomplete: {file} is missing; run `pharmacist fit` for this scorer$"
    ):
        score_here(candidates, tmp_path / "scores", **options)
    logits = {row.id: float(number) / 8 for number, row in enumerate(rows)}
    write_parquet(pa.table({"id": list(logits), "logit": pa.array(list(logits.values()), pa.float32())}), file)
    assert score_here(candidates, tmp_path / "scores", **options)["pharmacist"] == logits
    (tmp_path / "fit2").mkdir()
    for name in ("warmup", "directions"):
        (tmp_path / "fit2" / name).symlink_to(fitted / name)
    other = {row.id: logits[row.id] for row in rows[1:]}
    write_parquet(pa.table({"id": list(other), "logit": pa.array(list(other.values()))}), tmp_path / "fit2" / "logits.parquet")
    with pytest.raises(ArtifactError, match=rf"logits\.parquet has no logit for row {rows[0].id}: it was fitted on other "):
        score_here(candidates, tmp_path / "strange", **{**options, "fit": tmp_path / "fit2"})


def test_what_cannot_work_is_refused_before_anything_runs(
    candidates: Path, run_score: Callable[..., ScoreReport], tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"^unknown scorer 'los_gap' \(did you mean 'loss_gap'\?\); known: coverage, dsir, grad_norm, guard, "
    ):
        run_score(candidates, tmp_path / "out", ["los_gap"])
    for settings in ({"scorers": ["grad_norm"]}, {"selector": SELECTOR.model_copy(update={"cosine": True})}):
        with pytest.raises(
            ConfigError,
            match=r"^gradient norms \(the grad_norm scorer, selector\.cosine\) need scoring\.method=hooks, not 'ghost'$",
        ):
            run_score(candidates, tmp_path / "out", **{"scorers": ["pharmacist"], **settings}, method="ghost")
    with pytest.raises(ArtifactError, match=r"^no Parquet files at .*nowhere; run the stage that writes them first$"):
        run_score(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ray_local")
def test_no_room_for_an_actor_is_said_at_once(candidates: Path, model_folder: Path, fitted: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"^1 workers need 64 CPU but the cluster has 6; "):
        score(
            model=ModelRef(str(model_folder), template="plain", max_length=32),
            selector=SELECTOR,
            scoring=ScoringConfig(scorers=["pharmacist"]),
            resources=ResourcesConfig(cpus_per_worker=64),
            candidates=candidates,
            trusted=NONE,
            fit=fitted,
            out=tmp_path,
        )


@pytest.mark.usefixtures("ray_local")
def test_an_error_raised_inside_an_actor_comes_back_as_ours(
    candidates: Path, fitted: Path, run_score: Callable[..., ScoreReport], tmp_path: Path
) -> None:
    fit = tmp_path / "fit"
    fit.mkdir()
    for name in ("warmup", "directions"):
        (fit / name).symlink_to(fitted / name)
    with pytest.raises(ArtifactError) as raised:
        run_score(candidates, tmp_path / "out", ["loss_gap"], fit=fit)
    assert str(raised.value) == f"the selector in {fit} has no adapter 'reference'; run `pharmacist fit` for this scorer"
    assert list((tmp_path / "out").glob("part-0000[0-4].parquet")) == []


def test_scores_that_do_not_belong_are_refused(
    scored: Path, candidates: Path, run_score: Callable[..., ScoreReport], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for file in scored.iterdir():
        write_parquet(pq.read_table(file), out / file.name)
    write_parquet(pq.read_table(out / "part-00001.parquet").slice(1), out / "part-00001.parquet")
    rows = pq.read_metadata(candidates / "part-00001.parquet").num_rows
    with pytest.raises(
        ArtifactError, match=rf"part-00001\.parquet has {rows - 1} scores for {rows} candidates; remove it and score again$"
    ):
        run_score(candidates, out)
    write_parquet(pq.read_table(scored / "part-00001.parquet"), out / "part-00001.parquet")
    write_parquet(pq.read_table(scored / "part-00001.parquet"), out / "part-00077.parquet")
    with pytest.raises(
        ArtifactError, match=rf"^{out} holds scores of other candidates \(part-00077\.parquet\); remove the folder$"
    ):
        run_score(candidates, out)


def test_columns_come_in_the_order_asked_for() -> None:
    scoring = ScoringConfig(scorers=["random", "less"], random_draws=2)
    assert columns_of(scoring, SELECTOR) == ["random_0", "random_1", "less"]


def test_coverage_is_the_influence_on_each_group_in_a_column_of_its_own(
    score_here: Callable[..., Table], scored: Path, candidates: Path, fitted: Path, tmp_path: Path
) -> None:
    """A group whose direction is that of all rows scores as `pharmacist`, whatever stands beside it."""
    fit = shutil.copytree(fitted, tmp_path / "fit")
    directions = load_file(fit / "directions" / "step-000020.safetensors")
    (fit / "groups").mkdir()
    groups = {name: torch.stack([-tensor[1], tensor[0], 2 * tensor[1]]) for name, tensor in directions.items()}
    save_file(groups, fit / "groups" / "step-000020.safetensors")
    coverage = CoverageConfig(groups=3)
    got = score_here(candidates, tmp_path / "rows", fit=fit, scorers=["coverage", "less"], coverage=coverage)
    assert list(got) == ["coverage_0", "coverage_1", "coverage_2", "less"]
    want = read(scored)
    for column, name, factor in (("coverage_0", "less", -1), ("coverage_1", "pharmacist", 1), ("coverage_2", "less", 2)):
        assert got[column] == pytest.approx({id: factor * value for id, value in want[name].items()}, rel=1e-4, abs=1e-6)
    assert got["less"] == pytest.approx(want["less"], rel=1e-4, abs=1e-6)
