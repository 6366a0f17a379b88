"""The project itself: pins agree, import is fast, modules are small, notebooks are in form, the
command line speaks plainly."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))


def locked() -> dict[str, str]:
    lines = [
        x.strip()
        for x in (ROOT / "requirements.lock").read_text().splitlines()
        if x.strip() and not x.startswith("#")
    ]
    return {canonicalize_name(n): v for n, v in (line.split("==") for line in lines)}


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [
        Requirement(r)
        for r in [*project["dependencies"], *project["optional-dependencies"]["test"]]
    ]


def test_lock_pins_everything_declared_within_its_range():
    pins = locked()
    for requirement in declared():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not in requirements.lock"
        assert requirement.specifier.contains(pins[name], prereleases=True), (
            f"{name} {pins[name]} not in {requirement.specifier}"
        )
    assert (
        all(Version(v) for v in pins.values())
        and pins["torch"] == "2.13.0"
        and pins["lm-eval"] == "0.4.13"
    )


def test_environment_yml_installs_the_lock_and_the_package():
    import yaml

    content = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert content["dependencies"][-1]["pip"] == ["-r requirements.lock", "-e .[test]"]
    minimum = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert Requirement(f"python{minimum}").specifier.contains(
        content["dependencies"][0].split("=")[1] + ".0"
    )


def test_installed_versions_are_the_locked_ones():
    from importlib import metadata

    pins = locked()
    for requirement in declared():
        found = metadata.version(requirement.name).split("+")[0]
        assert found == pins[canonicalize_name(requirement.name)], requirement.name


def test_import_is_fast_and_light():
    code = (
        "import time; t = time.perf_counter(); import dcr; s = time.perf_counter() - t; import "
        "sys; "
        "heavy = [m for m in ('torch', 'transformers', 'pandas', 'sklearn') if m in "
        "sys.modules]; print(len(heavy), s)"
    )
    heavy, seconds = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert heavy == "0" and float(seconds) < 0.5


def test_tests_reach_no_network_but_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
    for host in ("192.0.2.1", "example.org"):
        with pytest.raises(OSError, match="tests have no network"):
            socket.create_connection((host, 80), timeout=1)


def test_public_names_resolve():
    import dcr

    for name in dcr.__all__:
        assert getattr(dcr, name) is not None
    with pytest.raises(AttributeError, match="it exports"):
        _ = dcr.nothing


def test_modules_stay_small_and_documented():
    for path in (ROOT / "dcr").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith('"""'), f"{path.name} has no docstring"
        assert len(text.splitlines()) <= 400, f"{path.name}: {len(text.splitlines())} lines"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_in_form(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (
        content["nbformat"] == 4
        and content["nbformat_minor"] >= 5
        and content["metadata"]["kernelspec"]["name"] == "python3"
    )
    cells = content["cells"]
    assert len({c["id"] for c in cells}) == len(cells) and cells[0]["cell_type"] == "markdown"
    code = [c for c in cells if c["cell_type"] == "code"]
    assert code[0]["metadata"]["tags"] == ["parameters"]
    for cell in code:
        source = "".join(cell["source"])
        assert len(source.splitlines()) <= 15 and not re.search(
            r"^\s*def |^\s*class |lambda", source, re.M
        )
        assert cell["execution_count"] and all(
            o["output_type"] != "error" for o in cell["outputs"]
        ), source[:60]
    assert 'profile = "reference"' in "".join(code[0]["source"])
    drawn = [c for c in code if any("image/png" in o.get("data", {}) for o in c["outputs"])]
    assert drawn  # nbval compares all but pictures, whose bytes hang on fonts
    assert all("nbval-ignore-output" in c["metadata"].get("tags", []) for c in drawn)
    assert path.stat().st_size < 2_500_000
    assert not re.search(r"/(?:work|root|home|tmp)/", path.read_text(encoding="utf-8")), (
        "a machine's path is in the notebook"
    )


def test_papermill_sees_the_parameters():
    import papermill

    for path in NOTEBOOKS:
        assert set(papermill.inspect_notebook(str(path))) == {
            "profile",
            "seeds",
            "run_dir",
            "overrides",
        }
