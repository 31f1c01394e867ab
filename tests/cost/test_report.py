"""`pagemill report`: what it refuses, what it works out, and that nothing in a result file gets out of its place in the page."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from cost import make_results
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pagemill.cli import app
from pagemill.cost import report, resultfile, units, verdict
from pagemill.cost.devices import reference
from pagemill.cost.published import _PRICED, published
from pagemill.cost.resultfile import ResultError, load
from pagemill.errors import OutputError, PagemillError

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1>&amp;\"'\u202e\x00\u2028{{7*7}}"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_results.write(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def page(results: list[str]) -> str:
    return report.render(load(results))


def saved(folder: Path, document: object, name: str = "result.json") -> str:
    path = folder / name
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return str(path)


def small(**changes: Any) -> dict[str, Any]:
    run = make_results.run("small", pages=5, concurrency=2)
    return make_results.document("bench", [run | changes])


# What is refused.


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ('{"a": NaN}', "NaN is not a number of JSON"),
        ('{"a": ' + "9" * 5000 + "}", "it is not JSON"),
        ("[]", "the file should be an object"),
        ("{}", "it has no schema"),
        ('{"schema": "pagemill-bench/9"}', "it has schema 'pagemill-bench/9', not 'pagemill-bench/1'"),
        (
            '{"schema": "pagemill-bench/1", "kind": "else"}',
            "kind should be one of bench, compare, simulation",
        ),
        ('{"schema": "pagemill-bench/1", "kind": "bench"}', "model is missing"),
        ('{"schema": "pagemill-bench/1", "kind": "bench", "model": "m"}', "runs is missing"),
        (
            '{"schema": "pagemill-bench/1", "kind": "bench", "model": "m", "runs": []}',
            "there is no run in it",
        ),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "it is not JSON"),
    ],
)
def test_a_file_that_is_no_result_is_refused_in_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    path = saved(tmp_path, text)
    with pytest.raises(ResultError) as error:
        load([path])
    assert str(error.value).startswith(path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pages": None}, "runs[0]: pages is missing"),
        ({"name": 5}, "runs[0]: name should be text"),
        ({"seconds": "1"}, "runs[0].seconds should be a number, got 1"),
        ({"seconds": -1}, "runs[0].seconds is no plausible number: -1"),
        ({"seconds": 1e300}, "runs[0].seconds is no plausible number"),
        ({"pages": 10**400}, "runs[0].pages is no plausible number"),
        ({"pages": True}, "runs[0].pages should be a number, got true"),
        ({"occupancy": 1.5}, "runs[0].occupancy should lie between 0 and 1, got 1.5"),
        (
            {"quality": {"benchmark_score": 94.1}},
            "runs[0].quality.benchmark_score should lie between 0 and 1",
        ),
        ({"latency_s": {"page": 3}}, "runs[0].latency_s.page should be an object"),
        ({"timeline": [{"source": "a"}]}, "runs[0].timeline[0]: arrived is missing"),
        ({"timeline": {}}, "runs[0].timeline should be a list"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = saved(tmp_path, small(**changes))
    with pytest.raises(ResultError, match=re.escape(says)) as error:
        load([path])
    assert str(error.value).startswith(path)


def test_infinity_written_as_a_number_is_refused(tmp_path: Path) -> None:
    text = json.dumps(small(seconds=12345.5)).replace("12345.5", "1e999")
    with pytest.raises(ResultError, match="no plausible number: inf"):
        load([saved(tmp_path, text)])


def test_files_that_are_missing_folders_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResultError, match=r"nowhere\.json: it cannot be read \(No such file"):
        load([str(tmp_path / "nowhere.json")])
    with pytest.raises(ResultError, match="it cannot be read"):
        load([str(tmp_path)])
    with pytest.raises(ResultError, match="cannot be read"):
        load(["a\0b"])
    monkeypatch.setattr(resultfile, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ResultError, match="it is larger than"):
        load([saved(tmp_path, small())])


def test_too_many_runs_are_refused(tmp_path: Path) -> None:
    run = make_results.run("r", pages=1, timeline=False)
    path = saved(tmp_path, make_results.document("bench", [run] * 300))
    assert len(load([path])[0].runs) == 300
    with pytest.raises(ResultError, match="more than 500 runs"):
        load([path, path])


def places(value: object, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(place for key, child in inner for place in places(child, (*way, key)))]


DOCUMENT = make_results.document("compare", [make_results.run("a", pages=2, concurrency=2, bits=0.5)])
PLACES = places(DOCUMENT)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(PLACES), JSON | st.sampled_from([HOSTILE, 0, 0.0, -1, {}, [], None]))
def test_whatever_stands_in_a_file_it_is_shown_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[Any, ...], value: object
) -> None:
    document = copy.deepcopy(DOCUMENT)
    if place:
        holder: Any = document
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = value
    path = saved(
        tmp_path_factory.getbasetemp(), document if place else json.dumps(value).replace("Infinity", "1e999")
    )
    try:
        files = load([path])
    except PagemillError as error:
        said = str(error)
    else:
        parsed(report.render(files))
        return
    assert "result.json" in said
    assert "\n" not in said


# What it works out.


def test_names_are_made_unique(tmp_path: Path) -> None:
    run = make_results.run("r", pages=2)
    one = saved(tmp_path, make_results.document("bench", [run, run]), "one.json")
    two = saved(tmp_path, make_results.document("bench", [run]), "two.json")
    assert [r.name for file in load([one, two]) for r in file.runs] == ["r (one)", "r (one) #2", "r (two)"]
    assert [r.name for r in load([two])[0].runs] == ["r"]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6))))
def test_the_frontier_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    kept = verdict.frontier(points)

    def beaten(p: tuple[int, int], q: tuple[int, int]) -> bool:
        return q != p and q[0] <= p[0] and q[1] >= p[1]

    best = {p for p in points if not any(beaten(p, q) for q in points)}
    assert {points[i] for i in kept} == best
    assert len(kept) == len(best)
    assert [points[i][0] for i in kept] == sorted(points[i][0] for i in kept)


def runs_of(
    tmp_path: Path, *runs: dict[str, Any], kind: str = "bench", price: float | None = 1.0
) -> list[Any]:
    return list(load([saved(tmp_path, make_results.document(kind, list(runs), price))])[0].runs)


def priced(name: str, usd_per_million: float, score: float | None) -> dict[str, Any]:
    run = make_results.run(name, pages=10, concurrency=2, score=score, degeneration=0.0)
    # One dollar an hour: the rate at which the stated price comes about.
    rate = 1e6 / 3600 / usd_per_million
    return run | {"usd_per_million_pages": usd_per_million, "pages_per_s": rate, "seconds": 10 / rate}


def test_the_cheapest_of_the_good_is_chosen(tmp_path: Path) -> None:
    runs = runs_of(
        tmp_path,
        priced("poor", 10, 0.5),
        priced("fair", 100, 0.9299),
        priced("near", 300, 0.931),
        priced("best", 900, 0.94),
    )
    said = verdict.judge(runs, (), 3_000_000)
    assert (
        "".join(text for text, _ in said.headline)
        == "At 3 M pages a month, near reads them for $900 a month."
    )
    assert "the best, best (0.940), costs 3 times as much" in said.sentences[1]
    assert "the cheapest, poor, costs 97 % less but reaches only 0.500" in said.sentences[1]
    assert [row.label for row in said.rows] == ["poor", "fair", "near", "best"]
    assert [row.chosen for row in said.rows] == [False, False, True, False]


def test_a_run_that_is_named_by_its_settings_is_named_by_its_model_too(tmp_path: Path) -> None:
    names = ["concurrency=2", "offline, concurrency=2", "fast", "concurrency=4, pagemill-tiny", "colour=red"]
    runs = [make_results.run(name, pages=3, concurrency=2) for name in names]
    found = [run.name for run in load([saved(tmp_path, make_results.document("bench", runs))])[0].runs]
    assert found == ["pagemill-tiny, concurrency=2", "pagemill-tiny, offline, concurrency=2", *names[2:]]


def test_runs_of_other_pages_are_said_to_be_and_simulated_ones_are_not(tmp_path: Path) -> None:
    few, more = (make_results.run(f"of {n}", pages=n, concurrency=2) for n in (5, 9))
    files = {
        "few.json": ("bench", few),
        "again.json": ("compare", dict(few, name="again")),
        "more.json": ("bench", more),
        "not.json": ("simulation", dict(more, name="card")),
    }
    paths = {n: saved(tmp_path, make_results.document(kind, [run]), n) for n, (kind, run) in files.items()}
    says = "did not all read the same pages"
    assert says not in report.render(load([paths["few.json"], paths["again.json"], paths["not.json"]]))
    assert says in report.render(load([paths["few.json"], paths["more.json"]]))


def test_the_first_timeline_is_one_that_knows_its_first_tokens(tmp_path: Path) -> None:
    best, mute, slow = (
        make_results.run(name, pages=4, concurrency=1, score=score, speed=speed, degeneration=0)
        for name, score, speed in (("best", 0.99, 1.0), ("mute", 0.5, 9.0), ("slow", 0.4, 0.1))
    )
    runs = [best, mute, slow]

    def shown() -> str | None:
        return report._shown(load([saved(tmp_path, make_results.document("compare", runs))])[0].runs)

    assert shown() == "best"
    best["timeline"] = [dict(row, first_token=None) for row in best["timeline"]]
    assert shown() == "mute"
    mute["timeline"] = []
    assert shown() == "slow"


def test_a_simulated_run_is_chosen_only_where_nothing_was_measured(tmp_path: Path) -> None:
    simulated = runs_of(tmp_path, priced("dream", 1, 0.99), kind="simulation")
    measured = runs_of(tmp_path, priced("real", 100, 0.9))
    chosen = verdict.choose(simulated + measured)
    assert chosen is not None
    assert chosen.name == "real"
    said = verdict.judge(simulated, (), 1000)
    assert "dream, by simulation, reads them" in "".join(text for text, _ in said.headline)


def test_machines_left_on_are_whole_and_not_overloaded(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, priced("r", 1e6 / 3600, 0.9))  # one page a second, one dollar an hour
    month = 730 * 3600
    for pages in (1, month // 2, int(month * 0.8), int(month * 0.8) + 1, 10 * month):
        count, dollars = verdict.always_on(run, pages) or (0, 0.0)
        assert (count - 1) * month * 0.8 < pages <= count * month * 0.8 + 1e-6
        assert dollars == pytest.approx(count * 730)


def test_without_a_price_time_is_said_and_a_price_can_be_given(tmp_path: Path) -> None:
    path = saved(tmp_path, make_results.document("bench", [make_results.run("r", usd_per_hour=None)], None))
    (run,) = load([path])[0].runs
    said = verdict.judge([run], published(), 1_000_000)
    assert "No run has a price" in "".join(text for text, _ in said.headline)
    assert "--usd-per-hour" in said.sentences[0]
    (run,) = load([path], usd_per_hour=3.6)[0].runs
    assert run.usd_per_million == pytest.approx(1e6 * 0.001 / run.pages_per_s)


def test_a_run_with_its_own_price_by_the_page_costs_nothing_by_the_hour(tmp_path: Path) -> None:
    run = make_results.run("api", usd_per_hour=None) | {
        "price": {"usd_per_page": 0.002},
        "usd_per_page": 0.002,
    }
    path = saved(tmp_path, make_results.document("compare", [run], None))
    (run,) = load([path], usd_per_hour=5.0)[0].runs
    assert (run.usd_per_hour, run.usd_per_million) == (None, 2000.0)
    assert verdict.judge([run], (), 1000).rows[0].machines is None


def test_the_price_that_an_always_on_machine_beats(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, priced("r", 100, 0.9))
    offers = [offer for offer in published() if offer.label == "Mistral OCR 3"]
    said = verdict.judge([run], offers, 1_000_000)
    # 730 dollars a month against 2 dollars per 1,000 pages
    assert (
        said.sentences[-1]
        == "Against Mistral OCR 3, a machine that is left on pays from 365,000 pages a month."
    )
    assert "Mistral OCR 3 at $2,000 (20 times as much)" in said.sentences[-2]


def test_published_prices() -> None:
    offers = {offer.label: offer for offer in published()}
    assert all(offers[model].usd_per_million is not None for model in _PRICED)
    assert len([o for o in offers.values() if o.score is not None]) == len(reference().scores)
    assert all(offer.price_source for offer in offers.values() if offer.usd_per_million is not None)
    assert all(offer.score_source for offer in offers.values() if offer.score is not None)
    # Token prices, at the tokens a page that are assumed, come out as what was measured by others.
    measured = offers["openai: GPT-4o, as measured by olmOCR"].usd_per_million
    assert offers["GPT-4o"].usd_per_million == pytest.approx(measured, rel=0.01)
    # 1.50 dollars per 1,000 for the first million pages, then 0.60
    assert offers["Amazon Textract"].usd(3_000_000) == pytest.approx(1500 + 2 * 600)
    assert offers["Amazon Textract"].usd(1000) == pytest.approx(1.5)


def test_series_of_a_sweep_hold_runs_that_differ_in_one_setting(tmp_path: Path) -> None:
    runs = [
        make_results.run(f"{c} {guard}", pages=4, concurrency=c)
        | {"settings": {"concurrency": c, "guard": guard, "x": None}}
        for guard in ("off", "rescue")
        for c in (4, 1, 2)
    ]
    series = report._sweeps(load([saved(tmp_path, make_results.document("bench", runs))]))
    assert [(s["label"], [p["name"] for p in s["points"]]) for s in series] == [
        ("pagemill-tiny, guard off", ["1 off", "2 off", "4 off"]),
        ("pagemill-tiny, guard rescue", ["1 rescue", "2 rescue", "4 rescue"]),
    ]
    assert not report._sweeps(load([saved(tmp_path, make_results.document("compare", runs))]))


def test_a_long_timeline_is_thinned_but_keeps_what_went_wrong(tmp_path: Path) -> None:
    run = make_results.run("long", pages=4000, concurrency=8, degeneration=0.02)
    (run,) = load([saved(tmp_path, make_results.document("bench", [run]))])[0].runs
    drawn = report._thinned(run.timeline, 500)
    bad = [page for page in run.timeline if page.status != "ok"]
    assert len(bad) > 40
    assert all(page in drawn for page in bad)
    assert 400 < len(drawn) <= 500


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (units.usd(0.01234), "$0.0123"),
        (units.usd(0.09), "$0.09"),
        (units.usd(0.5), "$0.50"),
        (units.usd(0.9996), "$1.00"),
        (units.usd(0.0), "$0"),
        (units.usd(4.5), "$4.50"),
        (units.usd(45.678), "$45.68"),
        (units.usd(99.999), "$100"),
        (units.usd(12345.6), "$12,300"),
        (units.usd(None), "–"),
        (units.number(1234567), "1,230,000"),
        (units.number(0.001234), "0.00123"),
        (units.number(9.999), "10.0"),
        (units.volume(2_500_000), "2.5 M"),
        (units.volume(1_234_567), "1,234,567"),
        (units.volume(999), "999"),
        (units.seconds(0.00035), "350 µs"),
        (units.seconds(0.9999), "1.00 s"),
        (units.seconds(425), "7 min 5 s"),
        (units.seconds(12000), "3 h 20 min"),
        (units.percent(0.00833), "0.83 %"),
        (units.percent(0.9), "90.0 %"),
        (units.percent(1e-6), "< 0.01 %"),
        (units.size(686e6), "686 MB"),
    ],
)
def test_numbers_as_people_read_them(said: str, meant: str) -> None:
    assert said == meant


# The page.


class _Parsed(HTMLParser):
    """Elements and attributes of a page, and the text of its scripts."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
        else:
            self.text += data


def parsed(page: str) -> _Parsed:
    """Parse a page; it must hold only elements that the template has, and point nowhere but into itself."""
    found = _Parsed()
    found.feed(page)
    tags = {tag for tag, _ in found.elements}
    assert not tags & {
        "img",
        "iframe",
        "object",
        "embed",
        "link",
        "base",
        "audio",
        "video",
        "use",
        "image",
        "form",
    }
    assert len(found.scripts) == 4
    for tag, attributes in found.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#"), attributes
    json.loads(found.scripts[0])
    return found


def test_the_page_is_one_small_file_that_names_nothing_outside(page: str) -> None:
    found = parsed(page)
    assert len(page.encode()) < 1_500_000
    css = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert css is not None
    assert "url(" not in css[1]
    assert "@import" not in css[1]
    policy = next(a["content"] or "" for t, a in found.elements if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert policy.count("'sha256-") == 3
    script_rule = policy.split("script-src")[1]
    assert "unsafe" not in script_rule
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {
        "verdict",
        "frontier",
        "stages",
        "timeline",
        "sweeps",
        "waste",
        "alignment",
        "runs",
        "published",
        "environment",
    } <= set(ids)


def test_every_number_that_is_drawn_stands_in_a_table(page: str, results: list[str]) -> None:
    text = parsed(page).text
    for file in load(results):
        for run in file.runs:
            assert run.name in text
            assert units.usd(run.usd_per_million) in text
            assert units.score(run.score) in text
            assert all(units.seconds(value) in text for value in run.stages.values())
    for offer in published():
        assert offer.label in text
        assert offer.price_source in text


def hostile() -> dict[str, Any]:
    """A document with `HOSTILE` wherever text goes."""

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {
                (
                    k if key in ("", "runs", "run", "quality") or isinstance(v, (dict, list)) else k + HOSTILE
                ): poison(v, k)
                for k, v in value.items()
            }
        if isinstance(value, list):
            return [poison(v, "run") for v in value]
        return value + HOSTILE if isinstance(value, str) and key not in ("schema", "kind") else value

    runs = [make_results.run(f"r{c}", concurrency=c, pages=20, degeneration=0.3, bits=0.4) for c in (1, 2)]
    document = make_results.document("bench", runs)
    poisoned = {k: v if k in ("runs", "price") else poison(v, k) for k, v in document.items()}
    poisoned["price"]["source"] += HOSTILE
    for run in poisoned["runs"]:
        run["name"], run["error"] = run["name"] + HOSTILE, HOSTILE
        run["settings"] = {"concurrency": run["settings"]["concurrency"], HOSTILE: HOSTILE}
        for row in run["timeline"]:
            row["source"], row["status"] = HOSTILE, row["status"] if row["status"] != "ok" else HOSTILE
    return poisoned


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    found = parsed(report.render(load([saved(tmp_path, hostile())]), title=HOSTILE))
    assert "<script>window.pwned=1</script>" in found.text  # shown, not run
    assert "\u202e" not in found.text
    assert "{{7*7}}" in found.text


def contrast(one: str, two: str) -> float:
    """Contrast of two #rrggbb colours by WCAG 2."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_text_has_contrast_in_both_themes(theme: int) -> None:
    css = report._asset("report.css")
    colors = {
        name: pair.split(", ")[theme] for name, pair in re.findall(r"--(\w+): light-dark\((.*?)\)", css)
    }
    for text in ("ink", "muted", "accent", "red", "measured", "compared", "simulated", "published"):
        for ground in ("card", "ground") if text in ("ink", "muted", "accent") else ("card",):
            assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
    for shape in ("prefill", "decode", "violet", "red"):
        assert contrast(colors[shape], colors["card"]) >= 3, shape


# Writing it.


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    source = saved(tmp_path, small())
    before = Path(source).read_bytes()
    with pytest.raises(OutputError, match="is no report of pagemill"):
        report.write([source], source)
    assert Path(source).read_bytes() == before
    output = tmp_path / "report.html"
    size = report.write([source], str(output), title="first")
    assert size == output.stat().st_size
    report.write([source], str(output), title="second")
    assert "<h1>second</h1>" in output.read_text("utf-8")
    with pytest.raises(OutputError, match="cannot be written"):
        report.write([source], str(tmp_path / "no" / "folder.html"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "result.json"]


def test_the_command(tmp_path: Path, results: list[str]) -> None:
    output = str(tmp_path / "r.html")
    run = CliRunner().invoke(
        app, ["report", *results, "-o", output, "--pages-per-month", "750k", "--title", "T & Q"]
    )
    assert run.exit_code == 0, run.output
    page = Path(output).read_text("utf-8")
    assert "At 750 k pages a month" in page
    assert "<h1>T &amp; Q</h1>" in page
    for arguments in (
        ["report", str(tmp_path / "none.json"), "-o", output],
        ["report", results[0], "-o", output, "--pages-per-month", "many"],
        ["report", results[0], "-o", output, "--pages-per-month", "0"],
        ["report", results[0], "-o", output, "--pages-per-month", "999999G"],
        ["report", results[0], "-o", results[0]],
        ["report"],
    ):
        assert CliRunner().invoke(app, arguments).exit_code == 2, arguments
