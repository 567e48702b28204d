"""`draftsmith env`: one screen for a person, one line for a program."""

import json

import pytest

from draftsmith.recipes.cli.main import run
from draftsmith.recipes.commands.checking import env as module

GPU = {"name": "Test GPU", "memory_gib": 80.0, "capability": "9.0", "bf16": True}


@pytest.fixture
def machine(monkeypatch):
    cpu = {
        "model": "Test CPU",
        "machine": "x86_64",
        "cores": 8,
        "cores_usable": 4,
        "torch_threads": 2,
        "flags": ["amx_bf16"],
    }
    facts = {"cpu": cpu, "memory_gib": 16.0, "gpus": [], "torch_cuda": None, "torch_hip": None}
    monkeypatch.setattr(module, "hardware", lambda: facts)
    return facts


def test_json_is_one_object_on_the_last_line(capsys):
    assert run(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(facts) == {"versions", "extras", "git", "hardware"}
    assert {"train", "deepspeed", "retrieval"} <= set(facts["extras"])


def test_lines_tell_the_machine_and_its_gpus(machine, capsys):
    machine["gpus"] = [GPU]
    machine["torch_cuda"] = "13.0"
    assert run(["env"]) == 0
    told = capsys.readouterr().out
    assert "Test CPU (x86_64)" in told
    assert "8, 4 usable, 2 torch threads" in told
    assert "amx_bf16" in told
    assert "Test GPU, 80.0 GiB, capability 9.0, bf16" in told
    assert "none" not in told


def test_lines_say_so_where_there_is_no_gpu_and_no_extra(machine, monkeypatch, capsys):
    monkeypatch.setattr(module, "extras", lambda: {"deepspeed": {"deepspeed": None}})
    assert run(["env"]) == 0
    told = capsys.readouterr().out
    assert "none that torch can use" in told
    assert "none in this build" in told
    assert "deepspeed absent" in told
