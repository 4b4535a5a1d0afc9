from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from pharmacist_ray.pipeline import console as module
from pharmacist_ray.pipeline.console import bar, escaped, say, watch_training


@pytest.mark.parametrize(
    "hostile",
    [
        "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "\x9b2J", "over\rwrite", "two\nlines",
        "\u202egnp.exe\u202c", "\u2066x\u2069", "zero\u200bwidth", "\ud800", "\x7f", "two\u2028lines",
    ],
)  # fmt: skip
def test_nothing_that_steers_a_terminal_is_left(hostile, capsys):
    shown = escaped(hostile)
    assert all(char.isprintable() for char in shown)
    assert "⟨U+" in shown
    say(shown)
    out = capsys.readouterr().out
    assert out.endswith("\n")
    assert out[:-1].isprintable()


@pytest.mark.parametrize(
    "text", ["[bold]x[/]", "[red]", "[/]", "[link=http://x]y[/link]", r"\[bold]", ":warning: [1, 2]", "[@click=x]y"]
)
def test_markup_of_data_is_printed_as_it_is(text, capsys):
    say(f"[bold]name[/]: {escaped(text)}")
    assert capsys.readouterr().out == f"name: {text}\n"


def test_a_backslash_at_the_end_of_data_does_not_switch_our_markup_off(capsys):
    say(f"{escaped('C:' + chr(92))}[bold]x[/]")
    assert capsys.readouterr().out == "C:" + chr(92) + "x\n"


def test_ordinary_text_stays_and_what_is_no_text_is_shown_as_such(capsys):
    assert escaped("Grüße, 你好 → ok") == "Grüße, 你好 → ok"
    say(escaped(Path("/a  b/[c]")))
    assert capsys.readouterr().out == "/a  b/[c]\n"


def test_what_cannot_be_seen_is_written_out():
    assert escaped("\u202egnp.exe\nok") == "⟨U+202E⟩gnp.exe⟨U+000A⟩ok"


def test_a_long_line_is_not_broken(capsys):
    say("x " * 300)
    assert capsys.readouterr().out.count("\n") == 1


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with bar("score (shards)") as show:
        for done in range(1, 7):
            now[0] += 4
            show(done, 6)
            show(done, 6)
    assert capsys.readouterr().out == "  score (shards): 3 of 6\n  score (shards): 6 of 6\n"


def test_a_log_is_told_what_goes_on_also_where_nothing_is_done_for_long(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with bar("search (trials)") as show:
        for note in (" · align", " · align", " · attack", " · attack"):
            now[0] += 11
            show(0, 2, note)
        show(2, 2, " · evaluate")
        show(2, 2)
    lines = ["0 of 2 · align", "0 of 2 · attack", "2 of 2 · evaluate"]
    assert capsys.readouterr().out.splitlines() == [f"  search (trials): {line}" for line in lines]


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    terminal = module.Console(force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(module, "console", terminal)
    with bar("fit [x]") as show:
        show(1, 4)
        show(4, 4)
    out = capsys.readouterr().out
    assert "fit [x]" in out
    assert "4/4" in out


def test_training_is_followed_through_the_files_it_leaves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "LOG_EVERY_S", -1.0)
    done, running, waiting = (tmp_path / name for name in ("done", "running", "waiting"))
    done.mkdir()
    (done / "result.json").write_text("{}")
    (tmp_path / "running.progress.json").write_text(json.dumps({"step": 3}))
    (tmp_path / "waiting.progress.json").write_text("{ half a fi")
    with watch_training("align", [done, running, waiting], [10, 10, 10]):
        pass
    assert capsys.readouterr().out == "  align: 13 of 30\n"


def test_an_interruption_is_told_once_and_not_that_of_an_earlier_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "LOG_EVERY_S", 1e9)
    file = tmp_path / "run.progress.json"
    values = {"name": "a [task]", "step": 4, "total": 9, "attempt": 2, "resumed": 3}
    file.write_text(json.dumps(values))
    with watch_training("align", [tmp_path / "run"], [9]):
        file.write_text(json.dumps({**values, "attempt": 3, "resumed": 4}))
        time.sleep(1.2)
    out = capsys.readouterr().out
    assert out.startswith("  a [task] was interrupted; it goes on after step 4 of 9 (attempt 3)\n")
    assert out.count("interrupted") == 1


def test_the_console_follows_what_stdout_is_now(capsys):
    assert module.console.file is sys.stdout
