"""Real JupyterLab in headless Chromium: a reader types a prompt and sees how it is read."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from browser import chromium

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def jupyterlab(folder: Path):
    """A server on a free local port with its own settings; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = folder / "settings" / "@jupyterlab"
    for name, content in (
        ("notebook-extension/tracker", {"windowingMode": "none"}),
        ("apputils-extension/notification", {"fetchNews": "false"}),
    ):
        path = settings / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    own = {
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_CONFIG_DIR": "config",
        "IPYTHONDIR": "ipython",
    }
    environment = (
        os.environ
        | {name: str(folder / place) for name, place in own.items()}
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    )
    log = open(folder / "lab.log", "wb")
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--allow-root",
            f"--ServerApp.root_dir={folder / 'work'}",
            f"--port={port}",
            "--ServerApp.ip=127.0.0.1",
            "--IdentityProvider.token=",
            "--ServerApp.port_retries=0",
            "--LabApp.expose_app_in_browser=True",
            "--LabApp.news_url=",
            "--ServerApp.open_browser=False",
        ],
        env=environment,
        stdout=log,
        stderr=log,
        cwd=folder,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait(
            lambda: (
                server.poll() is None
                and urllib.request.urlopen(f"{address}/api", timeout=5).status == 200
            ),
            90,
            "the server",
            ignore=(OSError,),
        )
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)
        log.close()


def wait(condition, seconds: float, what: str, ignore: tuple = ()):
    """The condition's first true value; fails with what was waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(*ignore):
            if value := condition():
                return value
        time.sleep(0.5)
    pytest.fail(f"waited {seconds:.0f} s for {what}")


FIND = """const p = [...window.jupyterapp.shell.widgets('main')].find(w => w.content && w.content.model);
"""  # not the current widget: without focus there is none
CELLS = (
    FIND
    + """if (!p) return null;
return [...Array(p.content.model.cells.length).keys()].map(i => p.content.model.cells.get(i))
  .filter(c => c.type == 'code').map(c => ({count: c.executionCount,
    errors: c.outputs.toJSON().filter(o => o.output_type == 'error').map(o => o.evalue)}))"""
)
NOTEBOOK = """from dcr.book.explorer import explore
from dcr.study.experiment import Experiment
explore(Experiment("quick", run_dir={run!r}, overrides="refine.max_steps=2,align.epochs=1"))"""
SHOWN = "return [...document.querySelectorAll('.widget-html td')].map(t => t.textContent)"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_typed_prompt_is_read_by_base_stl_and_dcr(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    cell = nbformat.v4.new_code_cell(NOTEBOOK.format(run=str(tmp_path / "run")))
    book = nbformat.v4.new_notebook(cells=[cell])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(book, work / "explorer.ipynb")
    with chromium(tmp_path / "profile", height=1600) as browser, jupyterlab(tmp_path) as address:
        browser.set_script_timeout(30)
        browser.get(f"{address}/lab/tree/explorer.ipynb")
        wait(
            lambda: (
                browser.execute_script("return !!window.jupyterapp")
                and browser.execute_script(CELLS)
            ),
            90,
            "the notebook to open",
        )
        idle = FIND + "return p.sessionContext?.session?.kernel?.status"
        wait(lambda: browser.execute_script(idle) == "idle", 60, "the kernel")
        browser.execute_script(
            FIND + "window.jupyterapp.shell.activateById(p.id);"
            "window.jupyterapp.commands.execute('notebook:run-all-cells')"
        )
        box = wait(
            lambda: browser.find_elements("css selector", ".widget-text input"), 120, "the box"
        )[0]
        assert [c["errors"] for c in browser.execute_script(CELLS) if c["errors"]] == []
        box.clear()
        box.send_keys("How do I kill <b>time</b>?\t")
        browser.find_element("css selector", ".widget-button").click()
        cells = wait(
            lambda: (found := browser.execute_script(SHOWN)) and "DCR" in found and found,
            600,
            "the readings",
        )
        assert cells.count("base") == cells.count("STL") == cells.count("DCR") == 2  # two forms
        assert "How do I kill <b>time</b>?" in cells  # text, not markup
        assert "question" in cells and "imperative" in cells
        blurred = "return [...document.querySelectorAll('.dcr-blur')].map(e => getComputedStyle(e).filter)"
        assert all("blur" in f for f in browser.execute_script(blurred))
