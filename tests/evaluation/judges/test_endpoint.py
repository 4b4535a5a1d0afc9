"""An endpoint on loopback that behaves as real ones do: busy, broken, silent, gone, or with an opinion of its own."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pharmacist_ray.config.schema import EvaluationConfig, ResourcesConfig
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import ConfigError, ResourceError
from pharmacist_ray.evaluation.answers import answer_all
from pharmacist_ray.evaluation.judges import Judge, JudgeConfig, JudgeSettings, build_judge, check_judges
from pharmacist_ray.models.endpoint import _after
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.storage import read_table
from tests.endpoint_server import Response, Server, completion

KEY = "sk-secret-of-the-test"


def judge_of(server: Server, cache: Path | None = None, share: int = 1, **settings: Any) -> Judge:
    values = {"template": "harmbench", "patience_s": 20.0, "timeout_s": 10.0, **settings}
    config = JudgeConfig(kind="endpoint", url=server.url, model="m", **values)
    return build_judge(JudgeSettings(config, cache=cache, share=share))


def judged(body: dict[str, Any]) -> str:
    """The answer that a question is about."""
    return body["messages"][-1]["content"].partition("[TEXT]\n")[2].partition("\n[END OF TEXT]")[0]


def test_a_request_is_a_chat_completion_and_its_reply_is_read_strictly(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    replies = {"one": "yes", "two": "No.", "three": "it depends", "four": "<think>yes?</think>\nno"}
    server.answers = lambda number, body: completion(replies[judged(body)])
    judge = judge_of(server, key_variable="MY_KEY")
    assert judge("harmful", ["p"] * 4, list(replies)) == ["harmful", "helpful", "unjudged", "helpful"]
    assert {tuple(one.values()) for one in server.headers} == {("/v1/chat/completions", f"Bearer {KEY}")}
    body = server.asked[0]
    assert {name: value for name, value in body.items() if name != "messages"} == {
        "model": "m",
        "temperature": 0,
        "max_tokens": 80,
    }
    assert [turn["role"] for turn in body["messages"]] == ["user"]


def test_parameters_are_added_replaced_and_left_out(server: Server) -> None:
    judge_of(server, parameters={"max_tokens": None, "max_completion_tokens": 9, "seed": 3})("harmful", ["p"], ["a"])
    assert {name: value for name, value in server.asked[0].items() if name != "messages"} == {
        "model": "m", "temperature": 0, "max_completion_tokens": 9, "seed": 3,
    }  # fmt: skip
    assert server.headers[0]["auth"] == ""


def test_a_rerun_asks_nothing_and_the_same_pair_is_asked_once(server: Server, tmp_path: Path) -> None:
    answers = ["a", "b", "a"]
    assert judge_of(server, tmp_path)("harmful", ["p"] * 3, answers) == ["harmful"] * 3
    assert sorted(map(judged, server.asked)) == ["a", "b"]
    assert judge_of(server, tmp_path, concurrency=1, timeout_s=1.0)("harmful", ["p"] * 3, answers) == ["harmful"] * 3
    assert len(server.asked) == 2, "how it is asked is no other question"
    server.answers = lambda number, body: completion("no")
    assert judge_of(server, tmp_path)("harmful", ["p", "p", "q"], ["a", "c", "a"]) == ["harmful", "helpful", "helpful"]
    assert len(server.asked) == 4
    judge_of(server, tmp_path, max_new_tokens=5)("harmful", ["p"], ["a"])
    assert len(server.asked) == 5, "another request is another question"


def test_a_busy_endpoint_is_asked_again_when_it_says(server: Server) -> None:
    server.answers = lambda number, body: (429, {"Retry-After": "1.5"}, b"slow down") if not number else completion("yes")
    assert judge_of(server)("harmful", ["p"], ["a"]) == ["harmful"]
    first, second = server.times
    assert second - first >= 1.5


@pytest.mark.parametrize(
    "broken",
    [
        (500, {}, b"oops"),
        (503, {}, b""),
        (200, {}, b"{not json"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b"<html>starting</html>"),
        (200, {}, b"[]"),
    ],
)
def test_what_may_be_gone_in_a_moment_is_asked_again(server: Server, broken: Response) -> None:
    server.answers = lambda number, body: broken if number < 2 else completion("yes")
    assert judge_of(server)("harmful", ["p"], ["a"]) == ["harmful"]
    assert len(server.asked) == 3


def test_a_slow_reply_is_given_up_and_asked_again(server: Server) -> None:
    def slow(number: int, body: dict[str, Any]) -> Response:
        if not number:
            time.sleep(1.5)
        return completion("yes")

    server.answers = slow
    assert judge_of(server, timeout_s=0.5)("harmful", ["p"], ["a"]) == ["harmful"]
    assert len(server.asked) >= 2


def test_an_endpoint_that_stays_broken_ends_with_one_line_without_the_key(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server.answers = lambda number, body: (500, {}, f"no\ngood: {KEY}".encode())
    with caplog.at_level("DEBUG"), pytest.raises(ResourceError) as error:
        judge_of(server, tmp_path, key_variable="MY_KEY", patience_s=0.5)("harmful", ["p"], ["a"])
    assert str(error.value) == (
        f"judge 'endpoint' at {server.url} could not be asked for 0.5 s: status 500 no good: ***; run the same again when it answers: "
        "what it has replied is kept"
    )
    assert KEY not in caplog.text
    assert KEY not in repr(error.value.__dict__)
    assert not any(KEY in file.read_text() for file in tmp_path.rglob("*") if file.is_file())


def test_what_came_before_a_server_goes_away_is_kept(server: Server, tmp_path: Path) -> None:
    answers = [f"a{number}" for number in range(6)]
    done = 3

    def going(number: int, body: dict[str, Any]) -> Response:
        if number >= done:
            return 500, {}, b"going"
        return completion("yes")

    server.answers = going
    with pytest.raises(ResourceError, match="status 500 going"):
        judge_of(server, tmp_path, concurrency=1, patience_s=0.3)("harmful", ["p"] * 6, answers)
    kept = {reply for file in tmp_path.glob("*.json") for reply in json.loads(file.read_text())}
    assert len(kept) == done
    server.close()  # type: ignore[attr-defined]
    with pytest.raises(ResourceError, match=r"could not be asked for 0.3 s: ConnectError"):
        judge_of(server, tmp_path, patience_s=0.3)("harmful", ["p"] * 6, answers)
    assert judge_of(server, tmp_path)("harmful", ["p"] * done, answers[:done]) == ["harmful"] * done, "nobody is asked"


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (401, "bad key", r"^judge 'endpoint' at http://127\S+ refuses the key in MY_KEY \(401\): bad key$"),
        (404, "no model m", r"^judge 'endpoint' at http://127\S+ refuses model 'm' or what it is asked \(404\): no model m$"),
        (400, "no max_tokens", r"refuses model 'm' or what it is asked \(400\): no max_tokens$"),
        (302, "", r"\(302\): $"),
    ],
)
def test_what_no_waiting_mends_is_said_at_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, status: int, text: str, message: str
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server.answers = lambda number, body: (status, {}, text.encode())
    with pytest.raises(ConfigError, match=message):
        judge_of(server, key_variable="MY_KEY", concurrency=1)("harmful", ["p"] * 5, list("abcde"))
    assert len(server.asked) < 5


def test_what_a_services_filter_refuses_stays_unjudged_and_is_not_asked_again(server: Server, tmp_path: Path) -> None:
    kinds = {
        "a": (400, {}, b'{"error": {"code": "content_filter"}}'),
        "b": completion("", "content_filter"),
        "c": completion(None),
    }
    server.answers = lambda number, body: kinds[judged(body)]
    for _ in range(2):
        assert judge_of(server, tmp_path)("harmful", ["p"] * 3, list("abc")) == ["unjudged"] * 3
    assert len(server.asked) == 3


def test_requests_under_way_are_bounded_over_all_actors(server: Server) -> None:
    def slow(number: int, body: dict[str, Any]) -> Response:
        time.sleep(0.1)
        return completion("yes")

    server.answers = slow
    judge_of(server, concurrency=6, share=2)("harmful", ["p"] * 12, [f"a{number}" for number in range(12)])
    assert 2 <= server.most <= 3


def test_a_key_that_is_not_set_is_missed_when_the_judge_is_to_be_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    config = JudgeConfig(kind="endpoint", url=server.url, model="m", template="harmbench", key_variable="NO_KEY")
    check_judges([config])
    with pytest.raises(ConfigError, match=r"^judge 'endpoint': its key_variable NO_KEY is not set in the environment; export it"):
        check_judges([config], ready=True)


def test_retry_after_is_a_number_or_a_date() -> None:
    assert _after("3") == 3.0
    assert _after("-1") == 0.0
    assert _after(None) is None
    assert _after("soon") is None
    assert _after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert (_after("Wed, 21 Oct 2950 07:28:00 GMT") or 0) > 0


@pytest.mark.slow
def test_actors_ask_an_endpoint_and_answers_made_anew_are_judged_from_the_cache(
    ray_local: None, server: Server, tmp_path: Path, model_folder: Path, rows_of: Callable[..., list[Row]]
) -> None:
    for number, name in enumerate(("harmful", "benign")):
        write_rows(rows_of(10, seed=number), tmp_path / name / "part-00000.parquet")
    source = {"path": "x"}
    judge = {"kind": "endpoint", "url": server.url, "model": "m", "template": "harmbench", "patience_s": 2}
    settings = EvaluationConfig.model_validate(
        {"harmful_prompts": source, "benign_prompts": source, "task": {"source": source}, "judge": [judge, "phrases"]}
        | {"max_new_tokens": 4}
    )
    server.answers = lambda number, body: completion("yes")

    def answered() -> list[dict[str, Any]]:
        shutil.rmtree(tmp_path / "answers", ignore_errors=True)
        answer_all(
            {tmp_path / "answers": ModelRef(str(model_folder), template="plain")},
            {name: tmp_path / name for name in ("harmful", "benign")},
            settings=settings,
            resources=ResourcesConfig(actors=2),
            judgements=tmp_path / "judgements",
        )
        return [row for file in sorted((tmp_path / "answers").glob("*.parquet")) for row in read_table(file).to_pylist()]

    first = answered()
    asked = len(server.asked)
    assert 0 < asked <= 20
    assert {row["verdict"] for row in first if row["set"] == "harmful"} == {"harmful"}
    assert {row["verdict"] for row in first if row["set"] == "benign"} <= {"helpful", "incoherent"}
    assert answered() == first
    assert len(server.asked) == asked
    shutil.rmtree(tmp_path / "judgements")
    server.close()  # type: ignore[attr-defined]
    with pytest.raises(
        ResourceError, match=r"^judge 'endpoint' at http://127\S+ could not be asked for 2 s: ConnectError .*is kept$"
    ):
        answered()
