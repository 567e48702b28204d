import json
import shlex

import pytest
from head_folders import LAYERS, eagle3, target_config

from draftsmith.infer.heads.folders import TrainedFor, save_eagle
from draftsmith.recipes.cli.main import run


@pytest.fixture
def head(tmp_path):
    target_config().save_pretrained(tmp_path / "target")
    save_eagle(
        tmp_path / "head", eagle3(norm_before_residual=True), TrainedFor(str(tmp_path / "target"), num_layers=LAYERS)
    )
    return tmp_path / "head"


def test_a_head_is_exported_with_the_line_that_serves_it(head, tmp_path, capsys):
    assert run(shlex.split(f"export {head} --out {tmp_path / 'out'} --engine vllm --json")) == 0
    printed = capsys.readouterr()
    files, serve, facts = printed.out.splitlines()
    assert files.startswith("eagle head: README.md, config.json, draftsmith.json, model.safetensors")
    assert serve == json.loads(facts)["serve"]
    assert '"method": "eagle3"' in serve
    assert "tokenizer was not at hand" in printed.err


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("--engine sglang", "sglang cannot run this head: norm_before_residual is not read there"),
        ("--exit 2", "holds eagle heads, which have no exits: leave --exit and --exits out"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(head, tmp_path, capsys, options, why):
    assert run(shlex.split(f"export {head} --out {tmp_path / 'out'} {options}")) == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert why in printed
    assert not (tmp_path / "out").exists()
