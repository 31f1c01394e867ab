"""The report in a real browser: headless Chromium, driven by chromedriver. Skipped where there is none."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pypdfium2
import pytest
from cost import make_results
from cost.test_report import hostile, saved

from pagemill.cost import report

webdriver = pytest.importorskip(
    "selenium.webdriver", reason="selenium is not installed (pip install -e .[dev])"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no browser: apt-get install chromium chromium-driver"
)

CHARTS = ("frontier", "stages", "timeline", "latency", "cost", "waste", "alignment")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # Without sandbox and shared memory: it runs as root and in containers.
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--lang=en",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    output = folder / "report.html"
    report.write(make_results.write(folder), str(output))
    return output


Show = Callable[..., Any]


@pytest.fixture
def show(browser: Any, path: Path) -> Iterator[Show]:
    """Open a page; at the end of the test there must have been no complaint on the console, and no request but for it."""

    def open_page(page: Path = path, width: int = 1200, scheme: str = "light", script: bool = True) -> Any:
        phone = width < 500
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 850, "deviceScaleFactor": 1, "mobile": phone},
        )
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {
                "media": "",
                "features": [
                    {"name": "prefers-color-scheme", "value": scheme},
                    {
                        "name": "prefers-reduced-motion",
                        "value": "reduce",
                    },  # a click must not meet a moving target
                ],
            },
        )
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
        browser.get(page.as_uri())
        return browser

    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    yield open_page
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked
    assert all(url.startswith(("file://", "about:")) and url.endswith((".html", ":blank")) for url in asked)


def drawn(browser: Any) -> dict[str, dict[str, Any]]:
    """Of every chart: how many shapes it has, its accessible name, and its width beside that of its place."""
    return browser.execute_script("""
        return Object.fromEntries([...document.querySelectorAll(".chart")].map((host) => {
            const svg = host.querySelector("svg");
            const shapes = [...(svg?.querySelectorAll("rect, circle, path") ?? [])].map((shape) => shape.getBBox());
            return [host.id.slice(6), {
                shapes: shapes.filter((box) => box.width + box.height > 0).length,
                name: svg?.getAttribute("aria-label"), role: svg?.getAttribute("role"), text: svg?.textContent ?? "",
                width: svg?.getBoundingClientRect().width, room: host.clientWidth,
            }];
        }));""")


def first_column(browser: Any) -> list[str]:
    return browser.execute_script(
        'return [...document.querySelectorAll("#table-runs tbody th")].map((th) => th.textContent)'
    )


def test_every_chart_is_drawn(show: Show) -> None:
    charts = drawn(show())
    assert sorted(charts) == sorted(CHARTS)
    for name, chart in charts.items():
        assert chart["shapes"] >= 3, name
        assert chart["role"] == "img"
        assert "numbers stand in a table" in chart["name"]
        assert chart["width"] == pytest.approx(chart["room"], abs=1)
        assert "NaN" not in chart["text"]
    assert "Claude Opus 4.6" in charts["frontier"]["text"]
    assert "$1k" in charts["frontier"]["text"]
    assert charts["stages"]["shapes"] >= 5 * 6


def test_a_published_point_tells_its_sources(show: Show) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    browser = show()
    point = browser.find_element(
        "css selector", "#chart-frontier g[aria-label=dot] path"
    )  # they are drawn first
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
    ActionChains(browser).move_to_element(point).perform()
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    said = browser.execute_script(
        "return document.querySelector('#chart-frontier g[aria-label=tip]').textContent"
    )
    for words in ("per million pages", "published: ", "Price: ", "Score: "):
        assert words in said


def test_degenerate_pages_are_red(show: Show) -> None:
    browser = show()
    fills = browser.execute_script("""
        const red = getComputedStyle(document.querySelector(".t-degenerate")).backgroundColor;
        return [...document.querySelectorAll("#chart-timeline rect")].map((r) => getComputedStyle(r).fill === red);""")
    data = json.loads(browser.execute_script('return document.getElementById("data").textContent'))
    run = browser.find_element("css selector", "#timeline-run option:checked").text
    (rows,) = (one["rows"] for one in data["timelines"] if one["run"] == run)
    assert sum(fills) == sum(row[5] == "degenerate" for row in rows) > 0


def test_tables_sort_by_mouse_and_keyboard_and_keep_what_is_missing_last(show: Show) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = show()
    heads = browser.find_elements("css selector", "#table-runs thead button")
    by_name = {head.text: head for head in heads}
    dollars = by_name["$/M pages"]
    dollars.click()
    ascending = first_column(browser)
    cells = browser.find_elements("css selector", "#table-runs tbody tr td:nth-child(3)")
    values = [float(cell.get_attribute("data-v")) for cell in cells]
    assert values == sorted(values)
    dollars.send_keys(Keys.ENTER)
    assert first_column(browser) == ascending[::-1]
    sorted_by = browser.find_elements("css selector", "#table-runs th[aria-sort]")
    assert [(th.text, th.get_attribute("aria-sort")) for th in sorted_by] == [("$/M pages", "descending")]
    column = list(by_name).index("bits/char") + 1
    for _ in range(2):
        by_name["bits/char"].send_keys(Keys.SPACE)
        cells = browser.find_elements("css selector", f"#table-runs tbody tr > :nth-child({column})")
        missing = [cell.get_attribute("data-v") == "" for cell in cells]
        assert any(missing)
        assert missing == sorted(missing)


def test_volume_changes_the_verdict(show: Show) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = show()

    def headline() -> str:
        (shown,) = (e for e in browser.find_elements("css selector", ".headline") if e.is_displayed())
        return str(shown.text)

    assert headline().startswith("At 2 M pages a month")
    browser.find_element("id", "volume").send_keys(Keys.ARROW_RIGHT)
    assert headline().startswith("At 5 M pages a month")
    assert browser.find_element("id", "volume-said").text == "5 M"
    browser.find_element("id", "volume").send_keys(Keys.HOME)
    assert headline().startswith("At 1 k pages a month")


def test_choosing_a_run_draws_its_timeline(show: Show) -> None:
    from selenium.webdriver.support.ui import Select

    browser = show()
    select = Select(browser.find_element("id", "timeline-run"))
    for option in ("tiny, concurrency 1", "tiny, stage 1"):
        select.select_by_visible_text(option)
        (said,) = (e for e in browser.find_elements("css selector", ".timeline-said") if e.is_displayed())
        assert said.text.startswith(f"{option}: ")
        assert drawn(browser)["timeline"]["shapes"] > 100


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_theme_follows_the_system_until_it_is_switched(show: Show, scheme: str) -> None:
    browser = show(scheme=scheme)
    browser.execute_script("localStorage.clear()")
    browser.refresh()

    def is_dark() -> bool:
        color = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, color.removeprefix("rgb(").rstrip(")").split(","))) < 300

    assert is_dark() == (scheme == "dark")
    button = browser.find_element("id", "theme")
    assert button.text.endswith("Light" if scheme == "dark" else "Dark")
    button.click()
    assert is_dark() != (scheme == "dark")
    browser.refresh()
    assert is_dark() != (scheme == "dark")  # remembered
    browser.execute_script("localStorage.clear()")


def test_a_phone_needs_no_scrolling_sideways(show: Show) -> None:
    browser = show(width=390)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    browser.execute_script("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    for name, chart in drawn(browser).items():
        assert chart["shapes"] >= 3, name
        assert chart["width"] <= chart["room"] + 1
    small = browser.execute_script("""
        const hasText = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        const size = (e) => parseFloat(getComputedStyle(e).fontSize);
        const shown = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && hasText(e));
        return shown.filter((e) => size(e) > 0 && size(e) < 11).map((e) => e.textContent);""")
    assert small == []


def test_charts_follow_the_width_of_the_window(show: Show) -> None:
    browser = show(width=1200)
    before = drawn(browser)["frontier"]["width"]
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 600, "height": 850, "deviceScaleFactor": 1, "mobile": False},
    )
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    after = drawn(browser)["frontier"]
    assert after["width"] < before
    assert after["width"] == pytest.approx(after["room"], abs=1)


def test_on_paper_everything_is_open_light_and_within_the_sheet(show: Show, tmp_path: Path) -> None:
    browser = show(scheme="dark")
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    document = pypdfium2.PdfDocument(base64.b64decode(printed["data"]))
    pages = [page.get_textpage().get_text_range() for page in document]
    text = " ".join(" ".join(pages).split())
    assert 3 <= len(pages) <= 16
    for words in (
        "At 2 M pages a month",
        "tiny, concurrency 32",
        "list price of tokens",
        "benchmark_score",
        "J/page",
    ):
        assert words in text, words
    assert "Dark" not in text
    assert "Permission to use" not in text  # licences stay closed
    bitmap = document[0].render(scale=0.2).to_numpy()
    assert bitmap[0, 0].min() > 250
    # Afterwards the page is as it was.
    assert drawn(browser)["frontier"]["room"] > 900
    assert not browser.find_elements("css selector", "#stages details[open]")


def test_without_scripts_the_words_and_tables_are_there(show: Show) -> None:
    browser = show(script=False)
    assert browser.find_element("css selector", ".headline:not([hidden] *)").is_displayed()
    assert all(not e.is_displayed() for e in browser.find_elements("css selector", ".script"))
    assert all(e.is_displayed() for e in browser.find_elements("css selector", ".timeline-said"))
    assert browser.find_element("id", "table-runs").is_displayed()


def test_hostile_results_run_nothing(show: Show, tmp_path: Path) -> None:
    output = tmp_path / "hostile.html"
    report.write([saved(tmp_path, hostile())], str(output), title="</title><script>window.pwned=1</script>")
    browser = show(output)
    assert browser.execute_script("return window.pwned ?? null") is None
    assert not browser.find_elements("css selector", "img")
    for name, chart in drawn(browser).items():
        assert chart["shapes"] >= 2, name
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 1200


def test_extremes_are_drawn(show: Show, tmp_path: Path) -> None:
    """One run without a price or a score; one of a million pages a second, one of none; a hundred of the same name."""
    lone = make_results.document(
        "bench", [make_results.run("lone", usd_per_hour=None, score=None, pages=1)], None
    )
    fast = make_results.run("fast", pages=3) | {
        "pages_per_s": 1e6,
        "usd_per_million_pages": 1e-9,
        "seconds": 0.0,
    }
    still = make_results.run("still", pages=2) | {
        "pages_per_s": 0.0,
        "pages": 0,
        "usd_per_million_pages": None,
    }
    same = [make_results.run("same", pages=2, concurrency=1 + i % 3) for i in range(100)]
    for name, document in (
        ("lone", lone),
        ("ends", make_results.document("bench", [fast, still])),
        ("many", make_results.document("bench", same)),
    ):
        output = tmp_path / f"{name}.html"
        report.write([saved(tmp_path, document, f"{name}.json")], str(output))
        browser = show(output)
        for chart in drawn(browser).values():
            assert "NaN" not in chart["text"]
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 1200


def test_the_policy_keeps_injected_scripts_from_running(browser: Any, path: Path) -> None:
    browser.get(path.as_uri())
    browser.execute_script("""
        const script = document.createElement("script");
        script.textContent = "window.pwned = 1";
        document.body.append(script);
        const image = document.createElement("img");
        image.src = "https://example.invalid/x.png";
        document.body.append(image);""")
    assert browser.execute_script("return window.pwned ?? null") is None
    said = " ".join(entry["message"] for entry in browser.get_log("browser"))
    assert "Content Security Policy" in said
