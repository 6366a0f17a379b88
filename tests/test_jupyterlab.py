"""Real JupyterLab in headless Chromium: notebook 01 on quick runs without error output, and a moved widget changes the picture.

Also after reopening: saved, the page loaded anew, and the widget moved again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from browser import chromium

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = "01_representations.ipynb"


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


CELLS = """const p = window.jupyterapp.shell.currentWidget; if (!p || !p.content || !p.content.model) return null;
return [...Array(p.content.model.cells.length).keys()].map(i => p.content.model.cells.get(i)).filter(c => c.type == 'code')
  .map(c => ({count: c.executionCount,
    errors: c.outputs.toJSON().filter(o => o.output_type == 'error').map(o => o.ename + ': ' + o.evalue)}))"""
PICTURE = """const done = arguments[0]; const i = document.querySelector('.widget-image');
if (!i || !i.complete || !i.naturalWidth) { done(''); return; }
const c = document.createElement('canvas'); c.width = i.naturalWidth; c.height = i.naturalHeight;
c.getContext('2d').drawImage(i, 0, 0); done(c.toDataURL());"""


def moved(browser) -> None:
    """Moves the layer slider by keyboard, as a reader would, and waits for another picture."""
    before = wait(lambda: browser.execute_async_script(PICTURE), 60, "the explorer's picture")
    handle = browser.find_element("css selector", ".widget-slider .noUi-handle")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", handle)
    handle.send_keys("\ue012")  # arrow left
    wait(
        lambda: (after := browser.execute_async_script(PICTURE)) and after != before,
        30,
        "the picture to change",
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_notebook_01_runs_in_jupyterlab_and_its_explorer_answers(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    content = json.loads((ROOT / "notebooks" / NOTEBOOK).read_text(encoding="utf-8"))
    cell = next(c for c in content["cells"] if "parameters" in c["metadata"].get("tags", []))
    cell["source"] = (
        "".join(cell["source"])
        .replace('run_dir = ""', f'run_dir = "{tmp_path / "run"}"')
        .replace(
            'overrides = ""',
            'overrides = "evaluation.kernel_prompts=2,evaluation.trajectory_prompts=4"',
        )
    )
    for c in content["cells"]:
        if c["cell_type"] == "code":
            c.update(outputs=[], execution_count=None)
    (work / NOTEBOOK).write_text(json.dumps(content), encoding="utf-8")
    with chromium(tmp_path / "profile", height=1600) as browser, jupyterlab(tmp_path) as address:
        browser.set_script_timeout(30)
        browser.get(f"{address}/lab/tree/{NOTEBOOK}")
        count = sum(
            c["cell_type"] == "code" for c in content["cells"]
        )  # before its content is there, a notebook is one empty cell
        wait(
            lambda: (
                browser.execute_script("return !!window.jupyterapp")
                and len(browser.execute_script(CELLS) or ()) == count
            ),
            90,
            "the notebook to open",
        )
        idle = "return window.jupyterapp.shell.currentWidget.sessionContext?.session?.kernel?.status == 'idle'"
        wait(lambda: browser.execute_script(idle), 60, "the kernel")
        browser.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        ran = wait(
            lambda: (
                (cells := browser.execute_script(CELLS))
                and (all(c["count"] for c in cells) or any(c["errors"] for c in cells))
                and cells
            ),
            400,
            "all cells to run",
        )
        assert [c["errors"] for c in ran if c["errors"]] == []
        moved(browser)
        browser.execute_async_script(
            "window.jupyterapp.commands.execute('docmanager:save').then(arguments[0])"
        )
        browser.refresh()
        wait(
            lambda: (
                browser.execute_script("return !!window.jupyterapp")
                and len(browser.execute_script(CELLS) or ()) == count
            ),
            90,
            "the notebook to open again",
        )
        wait(lambda: browser.execute_script(idle), 60, "the kernel that still runs")
        moved(browser)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
