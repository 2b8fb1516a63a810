"""The report in headless Chromium (about 15 s): what a reader sees, in either theme."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import example_results as examples
import pytest

from bakeoff.study.report import write_report

pytestmark = pytest.mark.browser

BROWSER = shutil.which("chromium") or "/usr/bin/chromium"
DRIVER = shutil.which("chromedriver") or "/usr/bin/chromedriver"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PAGES = {
    "full": examples.with_failure,
    "partial": examples.partial,
    "hostile": examples.hostile_names,
    "nulls": examples.with_nulls,
    "one": examples.one_design,
    "sixty": examples.sixty_designs,
    "none": examples.nothing_finished,
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("reports")
    for name, make in PAGES.items():
        write_report(make(), folder / f"{name}.html")
    return {name: (folder / f"{name}.html").as_uri() for name in PAGES}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    absent = [path for path in (BROWSER, DRIVER) if not Path(path).exists()]
    if absent:
        reason = f"not installed: {', '.join(absent)} (Debian: chromium, chromium-driver)"
        if os.environ.get("BAKEOFF_REQUIRE_BROWSER") == "1":
            pytest.fail(f"BAKEOFF_REQUIRE_BROWSER=1, but {reason}")
        pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def show(browser: Any, address: str, *, width: int = 1280, theme: str = "light") -> None:
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get_log("performance")
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(address)


def requests(browser: Any) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


@pytest.mark.parametrize("page", PAGES)
def test_no_console_message_and_no_request_but_the_file(
    browser: Any, pages: dict[str, str], page: str
) -> None:
    show(browser, pages[page])
    assert browser.get_log("browser") == []
    asked = [url for url in requests(browser) if not url.startswith("data:")]
    assert asked == [pages[page]]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("width", [400, 1600])
def test_the_page_never_scrolls_sideways(
    browser: Any, pages: dict[str, str], page: str, width: int
) -> None:
    show(browser, pages[page], width=width)
    seen = browser.execute_script(
        "return [innerWidth, document.documentElement.scrollWidth, document.body.scrollWidth]"
    )
    assert seen[0] == width
    assert max(seen) == width


def test_verdict_table_has_the_designs_in_order(browser: Any, pages: dict[str, str]) -> None:
    show(browser, pages["full"])
    results = examples.with_failure()
    rows = browser.execute_script(
        "return [...document.querySelectorAll('#verdict-table tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.innerText))"
    )
    assert len(rows) == len(results["designs"])
    for row, design in zip(rows, results["designs"], strict=True):
        record = design["metrics"]["mean_score"]["overall"]
        assert row[0].startswith(design["name"])
        expected = "reference" if design["name"] == results["reference"] else record["verdict"]
        assert row[1].endswith(expected)
        assert row[2] == f"{record['mean']:.3f}"
    headline = browser.execute_script("return document.querySelector('h1').innerText")
    assert headline.startswith("multi-layer, bidirectional helps: +0.050 mean score against mean")


def test_plots_are_drawn(browser: Any, pages: dict[str, str]) -> None:
    show(browser, pages["full"])
    boxes = browser.execute_script(
        """
        const shown = [...document.querySelectorAll('main > section figure')]
          .filter(figure => figure.checkVisibility());
        return shown.map(figure => ({
          kind: figure.className,
          marks: [...figure.querySelectorAll('use, .bar, .units path, .frontier, .group')]
            .map(mark => mark.getBoundingClientRect())
            .map(box => [box.width, box.height]),
          labels: [...figure.querySelectorAll('.axis text, text.x')]
            .map(text => text.getBoundingClientRect().width),
        }));
        """
    )
    assert [box["kind"] for box in boxes] == [
        "plot intervals",
        "plot ranks",
        "scatter",
        "plot units",
    ]
    for box in boxes:
        assert len(box["marks"]) >= 11
        assert all(max(size) > 0 for size in box["marks"])
        assert len(box["labels"]) >= 3
        assert all(width > 0 for width in box["labels"])


@pytest.mark.parametrize("width", [400, 1280])
def test_marks_stand_at_their_values(browser: Any, pages: dict[str, str], width: int) -> None:
    """Axis, grid lines and marks are separate drawings: they must agree to a pixel."""
    show(browser, pages["full"], width=width)
    found = browser.execute_script(
        """
        const middle = node => {
          const box = node.getBoundingClientRect();
          return (box.left + box.right) / 2;
        };
        const figure = document.querySelector('#intervals figure');
        const all = selector => [...figure.querySelectorAll(selector)].map(middle);
        return {
          zero: all('.zero')[0],
          ticks: [...figure.querySelectorAll('.axis text')]
            .filter(text => text.getBoundingClientRect().width > 0)
            .map(text => [Number(text.textContent.replace('−', '-')), middle(text)]),
          lines: all('.grid'),
          marks: all('use'),
          band: all('.band')[0],
        };
        """
    )
    results = examples.with_failure()
    assert all(any(abs(x - line) < 1 for line in found["lines"]) for _, x in found["ticks"])
    (first, x_first), *_, (last, x_last) = found["ticks"]
    per_unit = (x_last - x_first) / (last - first)
    for design, mark in zip(results["designs"], found["marks"], strict=True):
        value = design["metrics"]["mean_score"]["overall"]["difference"]
        assert mark == pytest.approx(x_first + per_unit * (value - first), abs=1.2)
    assert found["zero"] == pytest.approx(x_first - per_unit * first, abs=1)
    assert found["band"] == pytest.approx(found["zero"], abs=1)


def test_a_click_on_a_heading_sorts_and_a_second_one_reverses(
    browser: Any, pages: dict[str, str]
) -> None:
    show(browser, pages["partial"])
    results = examples.partial()

    def names() -> list[str]:
        found: list[str] = browser.execute_script(
            "return [...document.querySelectorAll('#verdict-table tbody .name')]"
            ".map(name => name.textContent)"
        )
        return found

    def click(heading: str) -> str:
        for button in browser.find_elements("css selector", "#verdict-table thead button"):
            if button.text.startswith(heading):
                browser.execute_script("arguments[0].click()", button)
                order: str = button.find_element("xpath", "..").get_attribute("aria-sort")
                return order
        raise AssertionError(f"no heading {heading}")

    assert names() == [design["name"] for design in results["designs"]]
    ran = [design for design in results["designs"] if design["cost"]]
    by_time = sorted(ran, key=lambda design: design["cost"]["wall_seconds"]["mean"])
    without = names()[-1]
    assert click("Time") == "ascending"
    assert names() == [*(design["name"] for design in by_time), without]
    assert click("Time") == "descending"
    # What has no value stays last either way.
    assert names() == [*(design["name"] for design in reversed(by_time)), without]
    assert click("Design") == "ascending"
    assert sorted(names(), key=str.lower) == names()
    sorted_columns = browser.find_elements("css selector", "#verdict-table [aria-sort]")
    assert len(sorted_columns) == 1


def test_the_cost_is_chosen_and_labels_never_overlap(browser: Any, pages: dict[str, str]) -> None:
    show(browser, pages["sixty"])
    options = browser.find_elements("css selector", "#cost-choice option")
    assert len(options) == 4
    for option in options:
        option.click()
        shown = browser.execute_script(
            "return [...document.querySelectorAll('figure.scatter')]"
            ".filter(figure => figure.checkVisibility()).map(figure => figure.dataset.cost)"
        )
        assert shown == [option.get_attribute("value")]
        boxes = browser.execute_script(
            """
            return [...document.querySelectorAll('figure.scatter:not([hidden]) text.placed')]
              .map(label => label.getBoundingClientRect())
              .map(box => [box.left, box.top, box.right, box.bottom]);
            """
        )
        assert len(boxes) >= 3
        for i, (left, top, right, bottom) in enumerate(boxes):
            for other in boxes[i + 1 :]:
                apart = right <= other[0] or other[2] <= left
                assert apart or bottom <= other[1] or other[3] <= top


CONTRAST = """
const luminance = colour => {
  const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map(part => {
    const share = part / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
};
const paper = luminance(getComputedStyle(document.body).backgroundColor);
const contrast = node => {
  const style = getComputedStyle(node);
  const text = luminance(node.namespaceURI.endsWith('svg') ? style.fill : style.color);
  return (Math.max(text, paper) + 0.05) / (Math.min(text, paper) + 0.05);
};
const kinds = ['h1', '.how', '.kicker', 'td .better', 'td .worse', 'td .undecided', 'a',
               '.legend .equivalent', '.cost', '.axis text', 'text.label', 'td.undecided'];
return [paper, Object.fromEntries(kinds.map(kind => [kind,
        contrast(document.querySelector(kind))]))];
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_are_readable(browser: Any, pages: dict[str, str], theme: str) -> None:
    show(browser, pages["full"], theme=theme)
    paper, contrasts = browser.execute_script(CONTRAST)
    assert paper > 0.9 if theme == "light" else paper < 0.05
    assert {kind: round(c, 2) for kind, c in contrasts.items() if c < 4.5} == {}


def test_hostile_names_do_nothing(browser: Any, pages: dict[str, str]) -> None:
    show(browser, pages["hostile"])
    assert browser.execute_script("return window.hacked === undefined")
    assert browser.execute_script("return document.images.length + document.scripts.length") == 1
    names = browser.execute_script(
        "return [...document.querySelectorAll('#verdict-table .name')].map(n => n.textContent)"
    )
    assert sorted(names) == sorted(examples.HOSTILE)


def test_printing_unfolds_everything_and_folds_it_again(
    browser: Any, pages: dict[str, str]
) -> None:
    show(browser, pages["full"])
    count = "return document.querySelectorAll('details:not([open])').length"
    folded = browser.execute_script(count)
    assert folded == 5
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script(count) == 0
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script(count) == folded
