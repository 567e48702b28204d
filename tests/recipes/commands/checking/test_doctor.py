"""`draftsmith doctor` as a person runs it: verdicts, mends, exit codes, wrong input."""

from __future__ import annotations

from pathlib import Path

import pytest
from ill_folders import ill, permuted_rotary, without_d2t
from tiny_folders import save, tiny_llama

from draftsmith.infer.heads.folders import save_eagle

# With so few tokens, as quick as can be.
QUICK = ("--limit", 6, "--max_new_tokens", 12)


def test_a_healthy_draft_is_exit_code_0_with_a_line_per_check(call, folders, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = call("doctor", folders.draft, "--target", folders.target, *QUICK)
    assert done.code == 0, done.out
    shown = done.out.splitlines()
    assert max(map(len, shown)) <= 80
    checks = [line.split("  ")[0] for line in shown if not line.startswith((" ", "draftsmith"))]
    assert checks == ["ok"] * len(checks)
    assert shown[-1] == f"draftsmith doctor: nothing wrong was found in {len(checks)} checks"


def test_a_fault_is_exit_code_1_with_its_mend(call, folders, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    place = ill(folders.draft, tmp_path / "ill", permuted_rotary)
    done = call("doctor", place, "--target", folders.target, "--reference", folders.draft, *QUICK)
    assert done.code == 1
    assert "stored as neighbours" in " ".join(done.out.split())
    assert "mend: reorder the rows of q_proj and k_proj" in " ".join(done.out.split())
    assert max(map(len, done.out.splitlines())) <= 80
    assert "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("draftsmith doctor: ")
    assert "checks found something wrong: rotary" in done.err.splitlines()[-1]


def test_json_has_every_finding_and_the_same_exit_code(call, folders, tmp_path):
    good = call("doctor", folders.draft, "--target", folders.target, "--json", *QUICK).json
    assert (good["kind"], good["wrong"], good["prompts"]) == ("draft", [], 6)
    assert {one["verdict"] for one in good["findings"]} == {"ok"}
    bad = call("doctor", folders.stranger, "--target", folders.target, "--json", *QUICK)
    assert bad.code == 1
    assert '"wrong": ["tokenizer"]' in bad.out.splitlines()[-1]


def test_a_target_alone_and_prompts_of_a_file(call, folders, rows_file):
    data = rows_file([{"prompt": "the quick brown fox"}, {"prompt": "over the lazy dog"}])
    found = call("doctor", folders.target, "--data", data, "--max_new_tokens", 12, "--json").json
    assert (found["kind"], found["target"], found["wrong"], found["prompts"]) == ("target", None, [], 2)
    assert {"tree", "greedy"} <= {one["check"] for one in found["findings"]}


def test_a_heads_refusal_is_a_finding(call, folders, tmp_path):
    from head_folders import eagle3

    target = save(tmp_path / "target", tiny_llama(vocab=300, num_hidden_layers=9), folders.tokenizer)
    head = eagle3()
    head.config.vocab_size = 300
    save_eagle(tmp_path / "head", head)
    place = ill(tmp_path / "head", tmp_path / "ill", without_d2t)
    done = call("doctor", place, "--target", target, "--limit", 1, "--max_new_tokens", 4)
    assert done.code == 1
    assert "draft vocabulary" in done.out
    assert "no d2t" in " ".join(done.out.split())
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/no/such"], "/no/such does not exist"),
        (["{draft}", "--target", "/no/such"], "/no/such does not exist"),
        (["{draft}", "--target", "{target}", "--reference", "/no/such"], "/no/such does not exist"),
        (["{draft}", "--reference", "{draft}"], "--reference and --exits are for drafts: give the --target"),
        (["{head}"], "holds eagle heads: give the --target that it drafts for"),
        (["{head}", "--target", "{target}", "--exits", "[1,2]"], "have no exits: leave --exits out"),
        (["{head}", "--target", "{target}", "--reference", "{draft}"], "another kind of draft"),
        (["{draft}", "--target", "{target}", "--device", "gpu"], "unknown device 'gpu'"),
        (["{draft}", "--target", "{target}", "--dtype", "float8"], "unknown dtype 'float8'"),
        (["{draft}", "--target", "{target}", "--template", "nosuch"], "unknown template 'nosuch'"),
        (["{draft}", "--target", "{target}", "--limit", "0"], "limit"),
        (["{draft}", "--target", "{torn}"], "torn could not be loaded"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(call, folders, tmp_path, words, expected):
    from head_folders import eagle3

    save_eagle(tmp_path / "head", eagle3())
    torn = Path(ill(folders.target, tmp_path / "torn"))
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:2000])
    names = {"draft": folders.draft, "target": folders.target, "head": tmp_path / "head", "torn": torn}
    done = call("doctor", *[word.format(**names) for word in words])
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert expected in line
