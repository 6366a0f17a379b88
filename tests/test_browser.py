"""The report and the explorer's prompts in a real headless browser: no console error, pictures shown, nothing sticks out."""

from __future__ import annotations

import pytest
from browser import chromium, errors
from test_report import make_report

from dcr.book.explorer import prompts_html

SCRIPT = '<img src=x onerror="window.hit = 1">'


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def test_report_opens_clean_at_1280_pixels(browser, tmp_path):
    report = make_report(tmp_path / "run")
    browser.get(report.as_uri())
    pictures = browser.execute_script(
        "return [...document.images].map(i => [i.alt, i.complete, i.naturalWidth, i.clientWidth])"
    )
    assert len(pictures) > 10 and all(
        done and natural > 100 and shown > 100 for _, done, natural, shown in pictures
    )
    assert browser.execute_script("return window.innerWidth") == 1280
    width, room = browser.execute_script(
        "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
    )
    assert width <= room
    assert errors(browser) == []
    outside = browser.execute_script(
        "return performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith('data:'))"
    )
    assert [name for name in outside if not name.startswith("file:")] == []
    links = browser.execute_script(
        "return [...document.querySelectorAll('#notebooks + ul a')].map(a => a.getAttribute('href'))"
    )
    assert links and all((report.parent / link).exists() for link in links)
    assert browser.execute_script(
        "return [...document.querySelectorAll('nav a')].every(a => document.querySelector(a.getAttribute('href')))"
    )


def test_toxic_prompts_are_blurred_until_clicked_and_nothing_runs(browser, tmp_path):
    import pandas as pd

    rows = pd.DataFrame(
        {
            "label": ["toxic", "seemingly_toxic"],
            "form": "question",
            "verdict": "refuse",
            "text": [SCRIPT, SCRIPT + "2"],
            "answer": ["never to be seen", SCRIPT + "3"],
        }
    )
    page = tmp_path / "page.html"
    page.write_text(
        f"<!doctype html><meta charset='utf-8'><link rel='icon' href='data:,'>{prompts_html(rows)}",
        encoding="utf-8",
    )
    browser.get(page.as_uri())
    blur = "return getComputedStyle(document.querySelector('.dcr-blur')).filter"
    assert "blur" in browser.execute_script(blur) and "never to be seen" not in browser.page_source
    browser.find_element("css selector", ".dcr-blur").click()
    assert browser.execute_script(blur) == "none"
    assert browser.execute_script("return window.hit || document.images.length") == 0
    assert (
        browser.execute_script("return document.querySelectorAll('.dcr-blur').length") == 1
        and errors(browser) == []
    )
