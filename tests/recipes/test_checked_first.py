"""What can be checked without a model's weights is refused before they are read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from draftsmith.infer.models.load import choose_device, load_model


@pytest.fixture
def refused(call, folders, rows_file, tmp_path, monkeypatch):
    """Run a command with a target and a question; the one line that refuses it. No weights are read, and nothing is
    left in the folder."""

    def read(name, **_):
        raise AssertionError(f"the weights of {name} were read")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)
    rows = rows_file([{"prompt": "a", "output": "b"}])
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def refused(command: str, *words: object) -> str:
        data = ["--prompt", "a"] if command == "generate" else ["--data", rows]
        done = call(*command.split(), "--target", folders.target, *data, *words)
        assert (done.code, done.out) == (2, ""), done.err
        assert list(here.iterdir()) == []
        (line,) = done.err.splitlines()
        return line

    return refused


@pytest.mark.parametrize("command", ["generate", "bench", "calibrate", "answers --out new"])
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("nosuch", "unknown drafter 'nosuch'"),
        ("small:{draft},nosuch", "unknown drafter 'nosuch'"),
        ("small:{draft}[topk=1]", "no argument 'topk'"),
        ("small:{draft}[top_k=x]", "top_k"),
        ("small:{draft}[top_k=0]", "top_k must be at least 1"),
        ("small:{draft}[min_confidence=2]", "min_confidence must lie between 0 and 1"),
    ],
)
def test_a_drafters_name_and_arguments(refused, folders, command, spec, expected):
    assert expected in refused(command, "--drafters", spec.format(draft=folders.draft))


@pytest.mark.parametrize("command", ["generate", "bench", "calibrate --drafters pld", "answers --out new",
                                     "store build dresd --out new"])  # fmt: skip
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--device", "gpu"], "unknown device 'gpu'; CUDA devices are called cuda"),
        (["--device", "nonsense"], "unknown device 'nonsense'"),
        (["--device", "meta"], "unknown device 'meta'"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
    ],
)
def test_device_and_dtype(refused, command, words, expected):
    assert expected in refused(command, *words)


def test_a_peer(refused, folders):
    assert "unknown peer 'nobody'" in refused("bench", "--peers", "nobody", "--out", "new")
    assert "/no/such" in refused("bench", "--peers", "assistant:/no/such", "--out", "new")


@pytest.mark.parametrize("command", ["bench", "calibrate --drafters pld", "store build dresd"])
def test_an_output_folder(refused, tmp_path, command):
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(command, "--out", tmp_path / "file")
    assert "is not a folder" in refused(command, "--out", tmp_path / "file" / "below")
    if command != "store build dresd":  # which resumes
        assert "is not empty" in refused(command, "--out", tmp_path)


def test_an_output_file(refused, tmp_path):
    assert "is a folder" in refused("answers", "--out", tmp_path)
    (tmp_path / "file").write_text("mine")
    assert "is not a folder" in refused("answers", "--out", tmp_path / "file" / "below")


def test_an_output_place_without_permission(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    assert "no permission to write in" in refused("bench", "--out", tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cuda", "built without CUDA; this machine has cpu"),
        ("cuda:3", "built without CUDA; this machine has cpu"),
        ("mps", "torch finds no such device; this machine has cpu"),
        ("cpu:x", "no device 'cpu:x'"),
        ("", "unknown device ''"),
    ],
)
def test_a_device_that_a_cpu_build_does_not_have(monkeypatch, name, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match=expected):
        choose_device(name)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


def test_a_cuda_device_beyond_the_last_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"no device 'cuda:2' here; this machine has cpu, cuda, cuda:1"):
        choose_device("cuda:2")


def test_a_damaged_weight_file_is_named(folders, tmp_path):
    shutil.copytree(folders.target, tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 5, 2000, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"torn could not be loaded: model\.safetensors is damaged or incomplete"):
            load_model(str(tmp_path / "torn"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("words", [["env"], ["--help"], ["bench", "--help"]])
def test_a_full_disk_behind_standard_output_is_one_line(words):
    program = "from draftsmith.recipes.cli.main import main; main()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, *words], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "the output cannot be written: No space left on device" in line


def test_a_closed_standard_output_is_no_error():
    program = "import sys; sys.stdout = None; from draftsmith.recipes.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", program, "--version"], stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_template_suggests_close_ones_and_says_how_to_list_all(folders):
    pytest.importorskip("fastchat")
    from draftsmith.infer.text.templates import find_template

    with pytest.raises(ValueError, match=r"unknown template 'vicuna_v1.0'; did you mean vicuna_v1.1") as raised:
        find_template("vicuna_v1.0", folders.tokenizer)
    assert "import conv_templates" in str(raised.value)
    assert len(str(raised.value)) < 250


def test_a_class_without_a_signature_is_named(refused, tmp_path):
    (tmp_path / "mine.yaml").write_text("class_path: builtins.dict\n")
    line = refused("generate", "--drafters", tmp_path / "mine.yaml")
    assert "drafter 'mine': builtins.dict has no signature" in line


def test_ids_that_a_store_does_not_hold_are_refused(call, folders, rows_file, tmp_path):
    store = str(tmp_path / "store")
    rows = rows_file([{"id": "1", "prompt": "a", "output": "b c"}, {"id": "2", "prompt": "a", "output": "d e"}])
    assert call("store", "build", "rest", "--data", rows, "--tokenizer", folders.target, "--out", store).code == 0
    done = call("store", "remove", store, "--ids", "1", "nosuchid")
    assert done.code == 2
    assert "holds no document with the id 'nosuchid'; nothing was removed" in done.err
    assert call("store", "remove", store, "--ids", "1", "--json").json["removed"] == 1


def test_scale_comes_from_the_flag_then_from_the_environment(call, monkeypatch, tmp_path):
    from draftsmith.recipes.quickstart import run as quickstart

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "run_steps", lambda steps, folder, seconds: len(steps))
    monkeypatch.setattr(quickstart, "_ending", lambda folder: [])
    monkeypatch.setenv("SCALE", "smoke")
    assert "scale smoke" in call("quickstart").out
    assert "scale full" in call("quickstart", "--scale", "full").out
    monkeypatch.setenv("SCALE", "huge")
    assert "variable SCALE takes smoke or small or full, not 'huge'" in call("quickstart").err
    monkeypatch.delenv("SCALE")
    assert "scale small" in call("quickstart").out
