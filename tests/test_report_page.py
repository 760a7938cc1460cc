"""The page of a report, in a browser."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import grid, paper, write_all

from fedtune.reports.report import report

WAIT = 20  # seconds until a page must have drawn itself


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1600"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Any:
    """Write a report of runs, and open it."""

    def opened(runs: list[Any], width: int = 1280) -> Any:
        write_all(tmp_path / "runs", runs)
        report(tmp_path / "runs", tmp_path / "out")
        size = {"width": width, "height": 1600, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get((tmp_path / "out" / "report.html").as_uri())
        end = time.monotonic() + WAIT
        while not browser.find_elements("css selector", "#tables table") and time.monotonic() < end:
            time.sleep(0.05)
        return browser

    return opened


def lines(browser: Any) -> list[str]:
    """The names of the drawn lines, bands apart."""
    script = "return document.getElementById('curves').data.filter(one => one.fill !== 'toself').map(one => one.name)"
    return list(browser.execute_script(script))


def choose(browser: Any, name: str, text: str) -> None:
    found = browser.find_elements("css selector", f"[id='{name}'] option")
    next(one for one in found if one.text == text).click()


def rows(browser: Any, table: int = 0) -> list[list[str]]:
    script = (
        "return [...document.querySelectorAll('#tables table')[arguments[0]].rows].map(r => [...r.cells].map(c => c.innerText))"
    )
    return list(browser.execute_script(script, table))


pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # selenium's own sockets


def test_the_page_opens_on_one_task_with_means_and_needs_no_network(opened: Any) -> None:
    browser = opened(grid(task=("imdb", "yelp"), clients=(1, 4, 16), seed=(0, 1, 2), baselines=(True,)))
    assert lines(browser) == ["4 clients", "16 clients", "one client", "centralised", "majority class"]
    bands = browser.execute_script("return document.getElementById('curves').data.filter(t => t.fill === 'toself').length")
    assert bands == 4
    assert len(rows(browser)) == 1 + 3  # of one task
    browser.find_element("id", "seeds").click()
    assert lines(browser).count("4 clients") == 1 + 3
    choose(browser, "task", "yelp")
    choose(browser, "metric", "loss, nats")
    title = "return document.getElementById('curves').layout.yaxis.title.text"
    assert browser.execute_script(title) == "loss, nats"
    requested = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in requested if not name.startswith("data:")] == []
    assert browser.get_log("browser") == []


def test_every_setting_that_differs_filters_curves_and_tables_and_is_in_legend_and_hover(opened: Any) -> None:
    browser = opened(grid(clients=(1, 4, 16), rate=(3e-4, 1e-3), seed=(0, 1), baselines=(True,)))
    drawn = lines(browser)
    assert len(drawn) == len(set(drawn)) == 7
    assert "4 clients, learning rate 0.0003" in drawn
    assert len(rows(browser)) == 1 + 6
    choose(browser, "by-model.learning_rate", "0.001")
    assert lines(browser)[:2] == ["4 clients, learning rate 0.001", "16 clients, learning rate 0.001"]
    assert [row[3] for row in rows(browser)[1:]] == ["0.001"] * 3
    hover = browser.execute_script("return document.getElementById('curves').data.find(t => t.hovertemplate).hovertemplate")
    assert "learning rate 0.001" in hover
    choose(browser, "by-clients", "4")
    assert "one client, learning rate 0.001" in lines(browser)  # baselines stay
    assert len(rows(browser)) == 2
    choose(browser, "by-clients", "all")
    choose(browser, "by-model.learning_rate", "all")
    browser.find_element("id", "tuned").click()
    assert lines(browser)[:2] == ["4 clients, learning rate 0.001", "16 clients, learning rate 0.0003"]
    assert browser.get_log("browser") == []


def test_tables_sort_by_number(opened: Any) -> None:
    browser = opened(grid(clients=(2, 4, 8, 16), seed=(0, 1)))

    def column(label: str) -> list[str]:
        heads = browser.find_elements("css selector", "#tables table:first-of-type th")
        next(head for head in heads if head.text.startswith(label)).find_element("tag name", "button").click()
        table = rows(browser)
        place = next(number for number, text in enumerate(table[0]) if text.startswith(label))
        return [row[place] for row in table[1:]]

    assert column("clients") == ["2", "4", "8", "16"]
    assert column("clients") == ["16", "8", "4", "2"]
    accuracies = [float(text.split()[0]) for text in column("accuracy")]
    assert accuracies == sorted(accuracies)


def test_a_narrow_screen_has_all_of_it_without_scrolling_sideways(opened: Any) -> None:
    browser = opened(grid(model=("bert", "albert"), split=("iid", "by_author"), clients=(1, 4), seed=(0, 1)), width=400)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    script = "return [1, 2, 3, 4].map(n => document.getElementById('curves').layout[`xaxis${n > 1 ? n : ''}`].domain)"
    domains = browser.execute_script(script)
    assert domains == [[0, 1]] * 4  # one below the other


def test_the_whole_grid_of_the_paper_is_a_page_of_six_megabytes_at_most(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [made for made in paper() if made.task in ("imdb", "yelp")][::3]
    monkeypatch.setattr("fedtune.reports.report.plot_grid", lambda rounds, path, also: [])  # it is about the page
    browser = opened(few)
    size = (tmp_path / "out" / "report.html").stat().st_size
    runs = browser.execute_script("return data.runs.length")
    assert runs == len(few) == 72
    of_plotly = browser.execute_script("return document.getElementById('plotly').textContent.length")
    assert of_plotly + (size - of_plotly) * 432 / runs < 6e6
