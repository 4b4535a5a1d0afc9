"""The page as a file, and as a real browser shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import unescape
from itertools import pairwise
from pathlib import Path

import pytest

from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.report.page import write_page
from pharmacist_ray.report.run_files import RunFiles
from pharmacist_ray.storage import write_text

SECTIONS = ["ran", "data", "scores", "examples", "comparison", "search", "redteam", "training", "reproduce"]


@pytest.fixture(scope="module")
def whole(make_run) -> Path:
    run = make_run().everything()
    return write_page(run.root, run.root / "report")


@pytest.fixture(scope="module")
def hostile(make_run) -> Path:
    run = make_run(hostile=True).everything()
    return write_page(run.root, run.root / "report")


def section(html: str, id: str) -> str:
    return html.partition(f'<section id="{id}"')[2].partition("</section>\n<section id=")[0]


def words(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_every_part_of_a_run_is_there_in_order(whole):
    html = whole.read_text()
    assert re.findall(r'<section id="(\w+)"', html) == SECTIONS
    assert "Not there yet" not in html
    assert "Mind:" not in html
    assert "selection by pharmacist, ratio 0.4" in words(section(html, "ran"))
    assert "versions Python 3.11.7, ray 2.60.0" in words(section(html, "ran"))
    assert "machine.gpus H1, H2" in words(section(html, "ran"))
    assert "f-selections/pharmacist" in section(html, "ran")
    assert "fit – – 0.50 align 2,500 – 3.00 attack 2,500 – 3.00" in words(section(html, "ran"))
    assert "candidates 67 60 2 5" in words(section(html, "data"))
    assert "candidates bad_json the line is not JSON, or not a JSON object 5" in words(section(html, "data"))
    assert "24 kept, 33 dropped" in section(html, "scores")
    assert (
        "strong pharmacist 2 24 1.2 0.40 0.40 [0.30, 0.50] 0.45 [0.35, 0.55] 0.50 [0.40, 0.60] – 0.55 0.55 [0.45, 0.65] 0.60 0.60"
        in words(section(html, "comparison"))
    )
    assert "strong pharmacist all +0.10 [+0.00, +0.20]" in words(section(html, "comparison"))
    assert "pharmacist run --config search/t01.yaml" in section(html, "search")
    told = words(section(html, "redteam"))
    assert "pharmacist.sft train.lr=1e-05, adapter=fresh 0.05 0.50 [0.10, 0.90] 0.9 → 0.9 0.9 → 0.9 4 of 5 0.6" in told
    assert "all.sft – 0.05 none – – 0 of 5 0.6" in told
    assert "pharmacist.sft: 0.20 from 100 rows on, 0.30 from 200 rows on" in told
    assert "pharmacist.sft train.lr=1e-06, adapter=fresh 0.60 [0.10, 0.90] 0.24 500 no" in told
    assert "pharmacist run --config" in section(html, "reproduce")
    assert "ratio: 0.4" in section(html, "reproduce")


def test_kept_and_dropped_rows_stand_side_by_side(make_run):
    run = make_run().everything()
    html = section(write_page(run.root, run.root / "report").read_text(), "examples")
    kept, _, dropped = html.partition("<h3>Dropped</h3>")
    known = [json.loads(line)["n"] for line in _lines(run.root)]
    shown = [[int(number) for number in re.findall(r">prompt (\d+) ", part)] for part in (kept, dropped)]
    assert [len(numbers) for numbers in shown] == [6, 6]
    assert set(shown[0]) <= set(known)
    assert not set(shown[1]) & set(known)
    scores = [float(text.replace("−", "-")) for text in re.findall(r"score ([\d.−e-]+)", kept + dropped)]
    assert scores == sorted(scores, reverse=True)


def _lines(root: Path) -> Iterator[str]:
    import pyarrow.parquet as pq

    yield from pq.read_table(root / "selections/pharmacist/rows")["raw"].to_pylist()


def test_a_page_loads_nothing_names_its_rules_and_is_the_same_each_time(whole, tmp_path):
    html = whole.read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)[1]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert not re.search(r"<(script|iframe|img|link|object|embed|base)\b|@import|\ssrc=|url\((?!#)|href=\"(?!#)", html)
    run = whole.parent.parent
    assert write_page(run, tmp_path).read_bytes() == whole.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(set(ids)) == len(ids)


def test_no_text_of_data_becomes_markup_or_steers_anything(hostile):
    html = hostile.read_text()
    assert not re.search(r"<(script|iframe|img|a\s+href=\"javascript)", html)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]", html)
    assert "⟨U+202E⟩gnp.exe" in html
    assert "{{ 7 * 7 }}" in html
    assert "&amp;lt;b&amp;gt;" in html
    assert html.count("</style>") == html.count("</title>") - html.count("</svg>") == 1


@pytest.mark.parametrize("which", ["whole", "hostile"])
def test_no_credential_is_on_the_page(which, request):
    html = request.getfixturevalue(which).read_text()
    assert not re.search("hunter2|abc123|tok-99", html)
    assert "s3://***@bucket/base?secret_key=***&amp;region=eu" in html
    assert "hub_token: &#39;***&#39;" in html


def test_what_is_missing_says_which_command_makes_it(make_run, tmp_path):
    run = make_run()
    run.config()
    done = {"ran", "reproduce"}
    for stages, ready in (
        ((), set()),
        ((run.ingest, run.score), {"data", "scores"}),
        ((run.select, run.train), {"examples", "training"}),
        ((run.evaluate, run.search, run.redteam), {"comparison", "search", "redteam"}),
    ):
        for stage in stages:
            stage()
        done |= ready
        html = write_page(run.root, tmp_path).read_text()
        missing = {id for id in SECTIONS if "Not there yet" in section(html, id)}
        assert missing == set(SECTIONS) - done
        for id, command in (("scores", "score"), ("comparison", "evaluate"), ("search", "search"), ("redteam", "redteam")):
            told = f"Not there yet. pharmacist {command} --config {run.root}/config.yaml makes it."
            assert (told in words(section(html, id))) == (id in missing)


def test_a_run_without_its_configuration_still_has_a_page(make_run, tmp_path):
    run = make_run()
    run.ingest()
    run.score()
    run.select()
    html = write_page(run.root, tmp_path).read_text()
    assert "24 kept" in section(html, "scores")
    assert "Not there yet" in section(html, "reproduce")


def test_what_was_made_from_something_else_is_said(make_run, tmp_path):
    run = make_run().everything()
    manifest = json.loads((run.root / "ingest/candidates/manifest.json").read_text())
    write_text(json.dumps(manifest | {"fingerprint": "f-newer"}), run.root / "ingest/candidates/manifest.json")
    html = words(section(write_page(run.root, tmp_path).read_text(), "ran"))
    assert "Mind: scores was made from an earlier ingest/candidates" in html
    assert "Mind: fit was made from an earlier ingest/candidates" in html
    assert "align/" not in html.partition("Mind:")[2]


@pytest.mark.parametrize(
    ("file", "id"),
    [
        ("evaluation/table.json", "comparison"), ("search/trials.parquet", "search"), ("fit/warmup/history.jsonl", "training"),
        ("scores/rows/part-00000.parquet", "scores"), ("ingest/candidates/manifest.json", "data"), ("config.yaml", "reproduce"),
    ],
)  # fmt: skip
def test_a_broken_file_costs_its_section_and_is_named(make_run, tmp_path, file, id):
    run = make_run().everything()
    (run.root / file).write_text("{ : [half a file")
    html = write_page(run.root, tmp_path).read_text()
    assert f"Mind: cannot read {run.root / file}" in words(section(html, id))
    assert "Not there yet" not in section(html, id)
    assert re.findall(r'<section id="(\w+)"', html) == SECTIONS


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ArtifactError, match="is not a run directory"):
        write_page(tmp_path, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_main_arm_is_the_configured_one_or_none(make_run):
    run = make_run().everything()
    assert RunFiles(run.root).main_arm == "pharmacist"
    run.config(selection={"scorer": "less", "ratio": 0.4})
    assert RunFiles(run.root).main_arm is None


# In a browser


@pytest.mark.parametrize("which", ["whole", "hostile"])
def test_a_browser_asks_for_nothing_and_complains_of_nothing(which, request, opened):
    file = request.getfixturevalue(which)
    page = opened(file)
    page.locator("summary").evaluate_all("all => all.forEach(one => one.click())")
    page.mouse.move(200, 400)
    page.wait_for_timeout(200)
    assert page.asked == [file.as_uri()]
    assert page.said == []
    assert page.evaluate("window.hit") is None
    assert page.locator("script, iframe, img, object, embed, link, foreignObject, [style*=url]").count() == 0
    attributes = "[...document.querySelectorAll('*')].flatMap(e => [...e.attributes].map(a => a.name + '=' + a.value))"
    assert page.evaluate(f"{attributes}.filter(text => /^(on|srcdoc)|^href=(?!#)/i.test(text))") == []
    assert "<script>window.hit = 1</script>" in page.locator("#examples").inner_text() or which == "whole"


def test_every_figure_is_drawn_named_and_has_its_numbers(whole, opened):
    page = opened(whole)
    for figure in page.locator("figure").all():
        assert figure.locator("figcaption").inner_text().strip()
        assert figure.locator("svg").count() >= 1
        assert figure.locator("details table tbody tr").count() >= 1
    pictures = page.locator("svg")
    assert pictures.count() >= 15
    for picture in pictures.all():
        box = picture.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 80
        assert picture.get_attribute("role") == "img"
    named = page.get_by_role("img").evaluate_all("all => all.map(e => e.querySelector('desc').textContent)")
    assert len(named) == pictures.count()
    assert all(len(text) > 10 for text in named)


def test_everything_opens_by_keyboard_and_focus_is_seen(whole, opened):
    page = opened(whole)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    reached, outlines = set(), set()
    for _ in range(200):
        page.keyboard.press("Tab")
        tag, number, outline = page.evaluate(
            "(() => { const e = document.activeElement; return [e.tagName, [...document.querySelectorAll(e.tagName)].indexOf(e),"
            " getComputedStyle(e).outlineStyle] })()"
        )
        if tag == "BODY" or (tag, number) in reached:
            break
        reached.add((tag, number))
        outlines.add(outline)
        if tag == "SUMMARY":
            page.keyboard.press("Enter")
    assert outlines == {"solid"}
    assert page.locator("details").count() == page.locator("details[open]").count() > 15
    assert sum(tag == "SUMMARY" for tag, _ in reached) == page.locator("summary").count()
    assert sum(tag == "DIV" for tag, _ in reached) == page.locator(".scroll").count()


def test_landmarks_headings_and_tables_are_in_order(whole, opened):
    page = opened(whole)
    assert page.evaluate("document.documentElement.lang") == "en"
    for landmark, count in (("banner", 1), ("navigation", 1), ("main", 1), ("contentinfo", 1)):
        assert page.get_by_role(landmark).count() == count
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(e => +e.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    links = page.evaluate("[...document.querySelectorAll('a')].map(e => e.getAttribute('href').slice(1))")
    assert links == ["main", *SECTIONS]
    assert page.evaluate(WRONG) == []


WRONG = """
() => {
  const wrong = [];
  const named = e => e.getAttribute('aria-labelledby').split(' ').every(id => document.getElementById(id)?.textContent);
  for (const e of document.querySelectorAll('[aria-labelledby]')) if (!named(e)) wrong.push(e.outerHTML.slice(0, 80));
  for (const table of document.querySelectorAll('table')) {
    const heads = [...table.tHead.rows[0].cells], rows = [...table.tBodies[0].rows];
    const fine = table.caption?.textContent && heads.every(head => head.scope == 'col')
      && rows.every(row => row.cells[0].scope == 'row' && row.cells.length == heads.length)
      && table.parentElement.tabIndex == 0 && table.parentElement.getAttribute('aria-label');
    if (!fine) wrong.push(table.outerHTML.slice(0, 80));
  }
  return wrong;
}
"""


CONTRAST = """
() => {
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length > 3 && n[3] == 0 ? null : n.slice(0, 3) };
  const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const behind = e => {
    for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c) return c }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    if (['title', 'desc'].includes(e.tagName)) continue;
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e), colour = parse(e.tagName == 'text' ? style.fill : style.color);
    const [a, b] = [light(colour), light(behind(e))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), e.tagName, e.textContent.slice(0, 40)]);
  }
  return found;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(whole, opened, scheme):
    page = opened(whole, scheme=scheme)
    page.locator("summary").evaluate_all("all => all.forEach(one => one.click())")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    found = page.evaluate(CONTRAST)
    assert len(found) > 500
    assert {"text", "TD", "SUMMARY", "CODE"} <= {tag for _, tag, _ in found}
    assert min(found)[0] >= 4.5, min(found)


@pytest.mark.parametrize("which", ["whole", "hostile"])
def test_a_telephone_needs_no_sideways_scrolling(which, request, opened):
    page = opened(request.getfixturevalue(which), width=360)
    page.locator("summary").evaluate_all("all => all.forEach(one => one.click())")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    sizes = page.evaluate("[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)")
    assert min(sizes) >= 9
    wide = page.locator("#comparison .scroll").first
    assert wide.evaluate("e => e.scrollWidth > e.clientWidth")
    wide.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(300)
    assert wide.evaluate("e => e.scrollLeft") > 0


def test_print_is_dark_on_white_also_in_dark_mode(whole, opened):
    page = opened(whole, scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert not page.locator("nav").is_visible()
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_warnings_and_agreement_of_judges_stand_on_the_page(make_run):
    made = make_run()
    made.config(evaluation={"judge": ["phrases", {"kind": "endpoint", "name": "mine"}]})
    made.evaluate()
    table = made.root / "evaluation" / "table.json"
    rows = json.loads(table.read_text())
    rows[0]["warnings"] = ["m: 9 of 10 answers to harmful prompts begin with the same words, '<b>other'"]
    table.write_text(json.dumps(rows))
    pair = {"prompts": "harmful", "judge": "phrases", "other": "mine", "n": 8, "unjudged": 0, "agreement": 0.75, "kappa": None,
            "harmful": 0.5, "harmful_by_other": 0.25}  # fmt: skip
    (made.root / "evaluation" / "judges.json").write_text(json.dumps([pair]))
    html = write_page(made.root, made.root / "report").read_text()
    assert "begin with the same words, &#39;&lt;b&gt;other&#39;" in html
    assert "phrases and mine say the same of 0.75 (Cohen&#39;s κ –)" in html
    assert "judge phrases, mine" in words(section(html, "ran"))
