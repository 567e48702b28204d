"""The quickstart: from this machine's own text to a table, taken up where it was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

COMMAND = [sys.executable, "-m", "draftsmith.recipes", "quickstart", "--scale", "smoke", "--out"]


def quickstart(folder) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, str(folder)], capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_it_goes_on_after_a_kill_and_ends_with_equal_answers(tmp_path):
    folder = tmp_path / "quick"
    begun = subprocess.Popen([*COMMAND, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / "target" / "model.safetensors").is_file():
        assert begun.poll() is None, "it ended before it was killed"
        time.sleep(0.2)
    os.kill(begun.pid, signal.SIGKILL)
    begun.wait()
    made = (folder / "target" / "model.safetensors").stat().st_mtime_ns

    done = quickstart(folder)
    assert done.returncode == 0, done.stderr
    assert "there already" in done.stdout
    assert (folder / "target" / "model.safetensors").stat().st_mtime_ns == made
    results = json.loads((folder / "bench" / "results.json").read_text())["drafters"]
    assert {"plain", "pld", "rest", "dresd", "small", "empty", "oracle", "adversary"} <= set(results)
    for name, row in results.items():
        assert row["errors"] == 0, name
        assert row["equal"] + row["ties"] == row["total"], name
    assert results["oracle"]["accepted_length"] > 3
    assert results["adversary"]["acceptance_rate"] == 0

    began = time.perf_counter()
    assert quickstart(folder).stdout.count("there already") == 6
    assert time.perf_counter() - began < 10


def test_every_step_prints_a_command_that_exists(tmp_path):
    from draftsmith.recipes.cli import COMMANDS
    from draftsmith.recipes.quickstart import SCALES, _steps

    for size in SCALES.values():
        for step in _steps(tmp_path, size, 0):
            words = " ".join(step.words)
            assert any(words.startswith(f"{name} ") for name in COMMANDS), words
