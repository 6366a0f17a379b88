"""The `dcr` command: one clear line for what is wrong, a stop that says how to go on, what a bug
report needs."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from typer.testing import CliRunner

from dcr import cli
from dcr.errors import DCRError
from dcr.run.store import Store

TINY = (
    "refine.layer=2,refine.max_steps=2,refine.batch_size=8,refine.lora_rank=2,align.max_steps=2,"
    "align.lora_rank=2,align.batch_size=8,generation.max_new_tokens=2,model.precision=fp32,"
    "data.limit=3,align.checkpoints=last"
)


def ask(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def told(*arguments):
    """The one line and exit status of a real process."""
    command = [sys.executable, "-m", "dcr.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.strip()


def test_an_error_is_one_line_and_exit_status_2(tmp_path):
    status, line = told("run", "--profile", "quikc", "--run-dir", tmp_path)
    assert status == 2 and line.startswith("dcr: profile 'quikc' is unknown; known: ")
    assert "\n" not in line and not list(tmp_path.iterdir())


def test_info_is_what_a_bug_report_needs_and_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = ask("info", "--profile", "quick")
    about, config = (yaml.safe_load(part) for part in found.stdout.split("\n\n", 1))
    assert {"dcr", "python", "platform", "packages", "device", "precision", "cache"} <= set(about)
    assert about["packages"]["torch"] and about["git_commit"] and config["profile"] == "quick"
    assert "secret" not in found.stdout


@pytest.mark.parametrize(
    "own", [{}, {"OMP_WAIT_POLICY": "ACTIVE", "PYTORCH_ENABLE_MPS_FALLBACK": "0"}]
)
def test_threads_wait_quietly_and_what_mps_lacks_runs_on_the_cpu(own):
    """Both are read when torch is loaded, so they are set before; a user's own values stay."""
    code = (
        "import os, sys; from dcr import cli; cli.app = lambda: print(*(os.environ[n] for n in "
        "sys.argv[1:]), 'torch' in sys.modules); cli.main()"
    )
    ours = {"OMP_WAIT_POLICY": "PASSIVE", "PYTORCH_ENABLE_MPS_FALLBACK": "1"}
    rest = {n: v for n, v in os.environ.items() if n not in ours}
    done = subprocess.run(
        [sys.executable, "-c", code, *ours], capture_output=True, text=True, env=rest | own
    )
    assert done.stdout.split() == [*(ours | own).values(), "False"], done.stderr


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_nothing_that_is_shown_moves_the_terminal(monkeypatch, capsys):
    """Escapes in names, logs and tables: as text, but in what is written to a file."""
    bad, text = "a\x1b[2J\u202eb", "a\\x1b[2J\\u202eb"
    assert f"{text} holds no finished run" in str(ask("verify", bad).exception)
    record = logging.LogRecord("dcr", logging.INFO, "", 0, f"{bad}\nsecond", (), None)
    assert cli.Printable("%(message)s").format(record) == f"{text}\nsecond"
    cli.show(f"method\n{bad}\n")
    assert capsys.readouterr().out == f"method\n{bad}\n"
    monkeypatch.setattr(sys, "stdout", Terminal())
    cli.show(f"method\n{bad}\n")
    assert sys.stdout.getvalue() == f"method\n{text}\n"


def test_run_table_and_verify(folder, tmp_path, monkeypatch):
    from dcr.study import registry

    registry.load_all()
    monkeypatch.setattr(registry, "TABLES", {})

    @registry.table("answered")
    def answered(experiment):
        return experiment.runs[0].generations("base")[["prompt_id", "n_tokens"]]

    @registry.table("cannot")
    def cannot(experiment):
        raise DCRError("needs STL")

    common = ["--profile", "quick", "--run-dir", tmp_path / "run"]
    common += ["--overrides", f"{TINY},model.name={folder}", "--methods", "base"]
    found = ask("run", *common)
    assert found.exit_code == 0, found.output
    assert "answered: written" in found.stdout and "cannot: needs STL" in found.stdout
    made = len(Store(tmp_path / "run").artifacts())
    assert made and f"run: {made} artifacts" in found.stdout.replace("\n", "")
    assert (tmp_path / "run" / "tables" / "answered.csv").is_file()
    table = ask("table", "answered", *common)
    assert table.stdout == (tmp_path / "run" / "tables" / "answered.csv").read_text()
    plain = ask("table", "answered", "--profile", "quick", "--run-dir", tmp_path / "run")
    assert plain.stdout == table.stdout, "the finished run's, where nothing else is asked for"
    found = ask("verify", tmp_path / "run")
    assert found.exit_code == 0 and "tables/answered.csv ok" in " ".join(found.stdout.split())
    (tmp_path / "run" / "tables" / "answered.csv").write_text("prompt_id\n")
    assert ask("verify", tmp_path / "run").exit_code == 1


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_within_seconds_and_says_how_to_go_on(folder, tmp_path, kind):
    overrides = TINY.replace("align.max_steps=2", "align.max_steps=100000")
    command = [sys.executable, "-m", "dcr.cli", "run", "--methods", "STL", "--no-tables"]
    command += ["--run-dir", str(tmp_path), "--overrides", f"{overrides},model.name={folder}"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as in the foreground
    )
    while not list(tmp_path.glob("align/*.partial/history.jsonl")):
        time.sleep(0.1)
        assert process.poll() is None, process.stderr.read()
    began = time.monotonic()
    process.send_signal(kind)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - began < 5
    assert said.rstrip().endswith("dcr: stopped. The same command goes on where it was.")
    assert "Traceback" not in said


@pytest.mark.parametrize("what", ["--overrides=refine.layer=3", "--methods=STL"])
def test_committed_tables_change_by_no_option(what):
    found = ask("table", "plane", what)
    assert isinstance(found.exception, DCRError) and "holds tables only" in str(found.exception)


def test_what_holds_tables_only_exports_nothing(tmp_path):
    found = ask("export", "DCR", tmp_path / "out", "--profile", "reference")
    assert isinstance(found.exception, DCRError) and "holds tables only" in str(found.exception)
