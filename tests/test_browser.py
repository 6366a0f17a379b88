"""The report and the explorer in a real headless browser: nothing sticks out, nothing runs."""

from __future__ import annotations

import fake_run
import pandas as pd
import pytest
from browser import chromium, errors

from dcr.book.explorer import rows_html
from dcr.book.report import write_report

SCRIPT = '<img src=x onerror="window.hit = 1">'
LIGHTNESS = """const rgb = c => c.match(/[0-9.]+/g).slice(0, 3).map(Number);
const mean = v => v.reduce((a, b) => a + b) / 3, s = getComputedStyle(document.body);
return [mean(rgb(s.color)), mean(rgb(s.backgroundColor))]"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(fake_run.write_run(tmp_path_factory.mktemp("runs") / "run"))


def emulate(browser, width: int, scheme: str) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_reads_well_at_two_widths_light_and_dark(browser, report, width, scheme):
    emulate(browser, width, scheme)
    browser.get(report.as_uri())
    pictures = browser.execute_script(
        "return [...document.images].map(i => [i.alt, i.complete, i.naturalWidth, i.clientWidth])"
    )
    assert len(pictures) >= 10 and all(
        alt and done and natural > 100 and 100 < shown <= width
        for alt, done, natural, shown in pictures
    )
    assert browser.execute_script("return window.innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    ink, page = browser.execute_script(LIGHTNESS)
    assert (page > 200 > 60 > ink) if scheme == "light" else (page < 60 < 200 < ink)
    first = browser.execute_script("return document.images[0].getBoundingClientRect().top")
    assert first < 900  # the plane is on the first screen
    outside = browser.execute_script(
        "return performance.getEntriesByType('resource').map(r => r.name)"
    )
    assert [n for n in outside if not n.startswith(("file:", "data:"))] == []
    links = browser.execute_script(
        "return [...document.querySelectorAll('#notebooks + ul a')].map(a => "
        "a.attributes.href.value)"
    )
    assert links and all((report.parent / link).exists() for link in links)
    assert browser.execute_script(
        "return [...document.querySelectorAll('nav a')]"
        ".every(a => document.querySelector(a.getAttribute('href')))"
    )
    assert errors(browser) == []


def test_toxic_prompts_are_blurred_until_clicked_and_nothing_runs(browser, tmp_path):
    rows = pd.DataFrame(
        {
            "label": ["toxic", "seemingly_toxic"],
            "verdict": ["refuse", SCRIPT + "1"],
            "text": [SCRIPT, SCRIPT + "2"],
        }
    )
    page = tmp_path / "page.html"
    head = "<!doctype html><meta charset='utf-8'><link rel='icon' href='data:,'>"
    page.write_text(head + rows_html(rows, ("verdict",)), encoding="utf-8")
    emulate(browser, 1280, "light")
    browser.get(page.as_uri())
    blur = "return getComputedStyle(document.querySelector('.dcr-blur')).filter"
    assert "blur" in browser.execute_script(blur)
    browser.find_element("css selector", ".dcr-blur").click()
    assert browser.execute_script(blur) == "none"
    assert browser.execute_script("return window.hit || document.images.length") == 0
    assert browser.execute_script("return document.querySelectorAll('.dcr-blur').length") == 1
    assert errors(browser) == []
