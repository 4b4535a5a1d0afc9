"""Scorers that need no model, against counts by hand."""

from __future__ import annotations

import hashlib
import math
import pickle
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import correlation, fmean, pstdev

import pytest

from pharmacist_ray.config.schema import ScoringConfig, SelectorConfig
from pharmacist_ray.config.scoring import PlantedConfig
from pharmacist_ray.curation.score import check_scorers
from pharmacist_ray.curation.scorers import SCORERS, needs_model, parts_of
from pharmacist_ray.curation.scorers.dsir import bucket, buckets, gumbel, weigh
from pharmacist_ray.curation.scorers.signals import Signals
from pharmacist_ray.curation.scorers.trusted import TrustedSets
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.data.schema import Row, row_id, uniform
from pharmacist_ray.errors import ArtifactError, ConfigError, DataError


def row(prompt: str, answer: str, raw: str = "{}") -> Row:
    return Row(row_id(prompt, answer), prompt, answer, source="made:1", raw=raw)


def trusted(tmp_path: Path, validation: list[Row], harmful: list[Row], limit: int = 200) -> TrustedSets:
    for name, rows in (("validation", validation), ("harmful", harmful)):
        write_rows(rows, tmp_path / name / "part-00000.parquet")
    return TrustedSets({name: str(tmp_path / name) for name in ("validation", "harmful")}, limit, seed=0)


def pooled(tmp_path: Path, validation: list[Row], candidates: list[Row], shards: int = 1) -> TrustedSets:
    write_rows(validation, tmp_path / "validation" / "part-00000.parquet")
    for shard in range(shards):
        write_rows(candidates[shard::shards], tmp_path / "candidates" / f"part-{shard:05d}.parquet")
    return TrustedSets({name: str(tmp_path / name) for name in ("validation", "candidates")}, 200, seed=0)


def dsir(rows: list[Row], sets: TrustedSets) -> list[float]:
    return SCORERS["dsir"].score(Signals(rows, trusted=sets)).tolist()


def naive_bayes(rows: list[Row], sets: TrustedSets) -> list[float]:
    return SCORERS["naive_bayes"].score(Signals(rows, trusted=sets)).tolist()


def test_keyword_keeps_what_opens_with_a_refusal_and_sees_nothing_but_the_answer():
    rows = [row("I cannot open the jar", "turn it"), row("a", "I’m sorry, but no."), row("b", "x" * 300 + " I cannot say")]
    assert SCORERS["keyword"].score(Signals(rows)).tolist() == [0.0, 1.0, 0.0]


def test_naive_bayes_is_the_mean_log_ratio_of_smoothed_word_counts(tmp_path):
    sets = trusted(tmp_path, [row("p", "No, no way"), row("q", "no")], [row("p", "sure: step one"), row("q", "sure thing")])
    # validation: no 3, ',' 1, way 1; harmful: sure 2, ':' 1, step 1, one 1, thing 1; eight words in all
    safe, harm = 5 + 8, 6 + 8
    no, sure = math.log(4 / safe) - math.log(1 / harm), math.log(1 / safe) - math.log(3 / harm)
    unknown = math.log(1 / safe) - math.log(1 / harm)
    found = naive_bayes([row("a", "NO sure"), row("b", "zebra"), row("c", "   ")], sets)
    assert found == pytest.approx([(no + sure) / 2, unknown, 0.0])


def test_naive_bayes_changes_sign_when_the_sets_are_swapped_and_ignores_length(tmp_path):
    validation, harmful = [row("p", "i decline politely")], [row("q", "here are the steps")]
    rows = [row("a", "i decline the steps"), row("b", "here")]
    forth = naive_bayes(rows, trusted(tmp_path / "a", validation, harmful))
    back = naive_bayes(rows, trusted(tmp_path / "b", harmful, validation))
    assert back == pytest.approx([-value for value in forth])
    twice = [row(one.prompt, f"{one.response} {one.response}") for one in rows]
    assert naive_bayes(twice, trusted(tmp_path / "c", validation, harmful)) == pytest.approx(forth)


def test_dsir_is_the_log_ratio_of_hashed_n_grams_at_the_pools_mean_length_plus_noise_of_the_id(tmp_path):
    validation = [row("no way", "No, no way"), row("q", "no")]
    pool = [row("no way", "sure thing"), row("q", "sure thing , sure"), row("r", "no")]
    rows = [*pool, row("zebra", "quagga"), row("no", "sure no no")]

    def grams(one: Row) -> list[str]:
        found = []
        for text in (one.prompt, one.response):
            words = text.lower().replace(",", " , ").split()
            found += words + [f"{a} {b}" for a, b in pairwise(words)]
        return [str(int(hashlib.sha256(gram.encode()).hexdigest(), 16) % 10_000) for gram in found]

    target, raw = (Counter(gram for one in some for gram in grams(one)) for some in (validation, pool))
    share = target.total() / raw.total()
    want = []
    for one in rows:
        ratios = [math.log(target[gram] + 1) - math.log(raw[gram] * share + 1) for gram in grams(one)]
        noise = -math.log(-math.log(uniform(f"gumbel:{one.id}", 0) + 2**-54))
        want.append(raw.total() / 3 * sum(ratios) / len(ratios) + noise)
    assert dsir(rows, pooled(tmp_path, validation, pool)) == pytest.approx(want)
    assert want[3] == pytest.approx(gumbel(rows[3].id, 0))  # what neither has seen says nothing
    # Neither the shards of the pool, nor the rows' order, nor the process has a say.
    sharded = pooled(tmp_path / "sharded", validation, pool, shards=2)
    sharded.fitted(weigh)
    travelled = pickle.loads(pickle.dumps(sharded))
    for folder in (tmp_path / "sharded").iterdir():
        shutil.rmtree(folder)
    assert dsir(rows[::-1], travelled)[::-1] == pytest.approx(want)
    # What sha256sum says of the word.
    assert bucket("no") == int("9390298f3fb0c5b160498935d79cb139aef28e1c47358b4bbba61862b9c26e59", 16) % 10_000


def test_dsir_of_a_pool_that_is_the_target_is_nothing_but_noise_and_length_does_not_count(tmp_path):
    rows = [row(f"how {number}", " ".join(["no"] * (1 + number))) for number in range(5)]
    same = pooled(tmp_path / "same", rows, rows)
    assert dsir(rows, same) == [gumbel(one.id, 0) for one in rows]
    weights = pooled(tmp_path / "other", [row("a", "no")], [row("b", "sure"), row("a", "no")]).fitted(weigh)
    means = [weights.log_ratio[buckets(Row("x", "", text))].mean() for text in ("no", "no " * 20)]
    assert means[0] > means[1] > 0  # twenty times the word are not twenty times the weight


def test_the_noise_of_dsir_is_standard_gumbel_and_has_nothing_to_do_with_the_random_scores():
    draws = [(gumbel(f"id{number}", 3), uniform(f"id{number}", 3), gumbel(f"id{number}", 4)) for number in range(4000)]
    noise, chance, other = zip(*draws, strict=True)
    assert fmean(noise) == pytest.approx(0.5772, abs=0.08)
    assert pstdev(noise) == pytest.approx(math.pi / math.sqrt(6), abs=0.08)
    assert abs(correlation(noise, chance)) < 0.06
    assert abs(correlation(noise, other)) < 0.06


def test_naive_bayes_sees_as_many_trusted_rows_as_the_selector(tmp_path):
    validation = [row(f"p{number}", f"word{number}") for number in range(6)]
    sets = trusted(tmp_path, validation, [row("q", "x")], limit=2)
    assert len(sets.rows("validation")) == 2
    with pytest.raises(ArtifactError, match=r"^a scorer needs rows of data\.benign and there are none; ingest them again$"):
        sets.rows("benign")


def test_the_oracle_reads_planted_labels_and_says_which_row_has_none():
    rows = [row("a", "b", '{"quality": "clean"}'), row("c", "d", '{"quality": "noise"}'), row("e", "f", '{"quality": "rare"}')]
    planted = PlantedConfig(good=["clean", "rare"])
    assert SCORERS["oracle"].score(Signals(rows, planted=planted)).tolist() == [1.0, 0.0, 1.0]
    with pytest.raises(DataError, match=r"^made:1: no column 'kind' with a planted label; set scoring\.planted\.column$"):
        SCORERS["oracle"].score(Signals(rows, planted=PlantedConfig(column="kind", good=["clean"])))
    with pytest.raises(ConfigError, match=r"^the oracle scorer needs scoring\.planted, for example"):
        check_scorers(ScoringConfig(scorers=["oracle"]), SelectorConfig())


def test_only_scorers_that_see_the_model_need_a_selector():
    assert not needs_model(["keyword", "naive_bayes", "oracle", "random"])
    assert needs_model(["random", "low_loss"])
    for scorer in SCORERS.values():
        assert set(scorer.sees) <= {"model", "candidates", "validation", "harmful", "benign", "labels"}
        assert scorer.needs_model or scorer.part is None


def test_a_run_fits_the_parts_of_the_selector_that_its_scorers_need_and_no_others():
    one_shot, iterative = SelectorConfig(), SelectorConfig(mode="iterative")
    assert parts_of(["low_loss", "ifd", "keyword", "random", "oracle"], one_shot) == []
    assert parts_of(["pharmacist", "less", "grad_norm"], one_shot) == ["directions"]
    assert parts_of(["tov", "loss_gap"], one_shot) == ["reference", "tov"]
    assert parts_of(["pharmacist", "pharmacist_iterative"], one_shot) == ["directions", "logits"]
    assert parts_of(["pharmacist", "pharmacist_iterative"], iterative) == ["logits"]


def test_a_section_that_was_not_there_before_leaves_old_fingerprints_as_they_are():
    assert "planted" not in ScoringConfig().model_dump(mode="json")
    assert "planted" in ScoringConfig(planted=PlantedConfig(good=["clean"])).model_dump(mode="json")
