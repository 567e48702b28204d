"""`store build`, `store quality` and the dresd study from the command line, and the stores they refuse."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("faiss", reason="DReSD's stores need the extra `retrieval`")

from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.recipes.cli.main import run
from draftsmith.recipes.studies import run_study
from draftsmith.recipes.studies.dresd import dresd
from draftsmith.retrieval import Dresd
from draftsmith.retrieval.store.segments import Manifest

TEXT = "the quick brown fox jumps over a lazy dog and then it says hello to all who stand there"
WORDS = TEXT.split()
CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make_tokenizer(template: str = CHAT, size: int = 320) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<eos>", "<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    core.train_from_iterator([TEXT] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def folder(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target with tokenizer, rows of several formats to store, and others to ask with."""
    import torch

    at = tmp_path_factory.mktemp("dresd")
    make_model("llama", torch.float32, vocab_size=320).save_pretrained(at / "target")
    make_tokenizer().save_pretrained(at / "target")
    draw = random.Random(0)

    def said() -> str:
        return " ".join(draw.choices(WORDS, k=12))

    pairs = [{"prompt": said(), "output": said()} for _ in range(40)]
    rows = [*pairs, {"text": said()}, {"question_id": 1, "category": "c", "turns": ["hello"]}]
    (at / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (at / "held.jsonl").write_text("".join(json.dumps({"prompt": said(), "output": said()}) + "\n" for _ in range(5)))
    questions = [{"question_id": i, "category": "c", "turns": [said()]} for i in range(3)]
    (at / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    words = ["store", "build", "dresd", "--target", str(at / "target"), "--data", str(at / "data.jsonl")]
    assert run([*words, "--out", str(at / "store"), "--dims", "16", "--device", "cpu"]) == 0
    return at


def test_a_store_says_what_it_was_built_from_and_for(folder: Path) -> None:
    manifest = json.loads((folder / "store" / "store.json").read_text())
    assert manifest["documents"] == 41
    assert manifest["template"]["name"] == "chat"
    assert manifest["provenance"]["config"]["feature"] == "last"
    files = {part["file"] for part in manifest["parts"].values()}
    assert files == {"tokens.bin", "ends.bin", "projection.bin", "index.faiss"}
    assert files | {"store.json"} == {file.name for file in (folder / "store").iterdir()}
    assert not list(folder.glob("*.part"))


def test_info_and_verify_know_a_dense_store_and_changing_it_is_refused(
    folder: Path, capsys: Any, tmp_path: Path
) -> None:
    store = shutil.copytree(folder / "store", tmp_path / "store")
    assert run(["store", "info", str(store), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["kind"], told["documents"]) == ("dresd", 41)
    assert told["tokens"] == told["manifest"]["keys"]
    assert run(["store", "verify", str(store)]) == 0
    for words in (["merge", str(store)], ["remove", str(store), "--ids", "x"]):
        assert run(["store", *words]) == 2
        assert "a dresd store cannot be changed" in capsys.readouterr().err
    data = (store / "ends.bin").read_bytes()
    (store / "ends.bin").write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert run(["store", "info", str(store)]) == 0
    assert run(["store", "verify", str(store)]) == 2
    assert "ends.bin was altered" in capsys.readouterr().err


def test_rows_that_hold_nothing_said_are_counted_with_their_reason(folder: Path, capsys: Any, tmp_path: Path) -> None:
    words = ["store", "build", "dresd", "--target", str(folder / "target"), "--data", str(folder / "data.jsonl")]
    assert run([*words, "--out", str(tmp_path / "s"), "--dims", "16", "--device", "cpu", "--json"]) == 0
    shown = capsys.readouterr()
    assert "42 rows read" in shown.err
    assert "skipped: 1 x" in shown.err
    assert json.loads(shown.out.splitlines()[-1])["documents"] == 41


def test_quality_and_bench_tell_their_figures_as_json(folder: Path, capsys: Any) -> None:
    common = ["--target", str(folder / "target"), "--device", "cpu", "--json"]
    held = ["--data", str(folder / "held.jsonl"), "--indexes", "flat", "hnsw"]
    assert run(["store", "quality", str(folder / "store"), *common, *held]) == 0
    quality = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert quality["self_recall_mrr"] > 0.9
    assert [index["index"] for index in quality["indexes"]] == ["flat", "hnsw"]
    assert quality["indexes"][0]["recall@10"] == 1.0
    assert set(quality["held_out"]["best"]) == {"1", "2", "4"}
    drafters = ["--drafters", f"dresd:{folder / 'store'},pld", "--data", str(folder / "questions.jsonl")]
    run_study(dresd, [*common, *drafters, "--max_new_tokens", "12", "--min_distinct", "0"])
    drafted = json.loads(capsys.readouterr().out.splitlines()[-1])["drafters"]
    assert set(drafted) == {"plain", "dresd", "pld"}
    assert drafted["dresd"]["accepted_length"] >= 1
    assert drafted["dresd"]["propose_ms_p50"] > 0


def test_figures_are_told_to_a_person_as_lines(folder: Path, capsys: Any) -> None:
    words = ["--target", str(folder / "target"), "--data", str(folder / "held.jsonl"), "--device", "cpu"]
    assert run(["store", "quality", str(folder / "store"), *words]) == 0
    assert "mean reciprocal rank" in capsys.readouterr().out


def test_a_store_for_another_tokenizer_or_chat_template_is_refused(folder: Path, make_model: Any) -> None:
    import torch

    model = make_model("llama", torch.float32, vocab_size=320)
    drafter = Dresd(str(folder / "store"))
    drafter.bind(HFTarget(model, make_tokenizer()))
    with pytest.raises(ValueError, match="another tokenizer"):
        drafter.bind(HFTarget(model, make_tokenizer(size=300)))
    with pytest.raises(ValueError, match="another chat template"):
        drafter.bind(HFTarget(model, make_tokenizer(template=CHAT.replace("assistant", "model"))))


def test_wrong_input_is_one_line_and_exit_code_2(folder: Path, capsys: Any, tmp_path: Path) -> None:
    build = ["store", "build", "dresd", "--target", str(folder / "target"), "--device", "cpu"]
    for words, line in (
        (["--data", str(folder / "data.jsonl"), "--out", str(folder / "store")], "already exists"),
        (["--data", str(folder / "nowhere.jsonl"), "--out", str(tmp_path / "a")], "nowhere.jsonl"),
        (["--data", str(folder / "questions.jsonl"), "--out", str(tmp_path / "b")], "no two tokens"),
        (["--data", str(folder / "data.jsonl"), "--out", str(tmp_path / "c"), "--feature", "first"], "unknown feature"),
    ):
        capsys.readouterr()
        assert run([*build, *words]) == 2
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert line in told


RECIPES = Path(__file__).resolve().parents[4] / "recipes"


@pytest.mark.parametrize("name", ["build_dresd_ood.yaml", "build_dresd_id.yaml"])
def test_a_recipe_builds_a_store_when_it_is_given_the_data(folder: Path, tmp_path: Path, name: str) -> None:
    words = ["store", "build", "dresd", "--config", str(RECIPES / name), "--target", str(folder / "target")]
    own = ["--data", str(folder / "data.jsonl"), "--out", str(tmp_path / "store"), "--device", "cpu"]
    assert run([*words, *own]) == 0
    manifest = json.loads((tmp_path / "store" / "store.json").read_text())
    # The tiny target's states are 32 wide.
    assert (manifest["dims"], manifest["feature"]) == (32, "last")


def test_the_targets_own_answers_are_drafted_again(folder: Path, tmp_path: Path, capsys: Any) -> None:
    target = ["--target", str(folder / "target"), "--device", "cpu", "--json"]
    questions, said = str(folder / "questions.jsonl"), str(tmp_path / "answers.jsonl")
    assert run(["answers", *target, "--data", questions, "--out", said, "--max_new_tokens", "24"]) == 0
    assert run(["store", "build", "dresd", *target, "--data", said, "--out", str(tmp_path / "own")]) == 0
    # The answer's tokens, as they were emitted, and the prompt's last one before them.
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["keys"] == 3 * 25
    drafters = ["--drafters", f"dresd:{tmp_path / 'own'}[num_drafts=1,min_confidence=0]", "--data", questions]
    run_study(dresd, [*target, *drafters, "--max_new_tokens", "24", "--min_distinct", "0"])
    drafted = json.loads(capsys.readouterr().out.splitlines()[-1])["drafters"]["dresd"]
    assert drafted["equal"] == drafted["total"] == 3
    # The first step reads the prompt's end and drafts nothing; three more draft the other 23 tokens.
    assert drafted["accepted_length"] == pytest.approx(24 / 4)


@pytest.mark.slow
def test_the_in_distribution_script_answers_builds_and_measures_and_can_be_run_again(
    folder: Path, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TARGET": str(folder / "target"),
        "PROMPTS": str(folder / "data.jsonl"),
        "HELD_OUT": str(folder / "questions.jsonl"),
        "OUT": str(tmp_path / "out"),
        "LIMIT": "12",
    }
    for _ in range(2):
        done = subprocess.run(
            ["bash", str(RECIPES / "build_dresd_id.sh")], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert "mean reciprocal rank" in done.stdout
    Dresd(str(tmp_path / "out" / "store"))


@pytest.mark.parametrize("recipe", ["build_rest_chat", "build_rest_code"])
def test_the_recipes_build_rest_stores(recipe: str, tmp_path: Path, word_tokenizer: Path) -> None:
    pytest.importorskip("fastchat.conversation", reason="the recipes' template is FastChat's (extra `train`)")
    logs = tmp_path / "logs.jsonl"
    rows = [{"prompt": f"{i} + {i}?", "output": f"The sum of {i} and {i} is {2 * i}."} for i in range(30)]
    logs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--data", str(logs), "--tokenizer", str(word_tokenizer), "--out", str(tmp_path / "s"), "--limit", "5"]
    assert run(["store", "build", "rest", "--config", str(RECIPES / f"{recipe}.yaml"), *words]) == 0
    assert Manifest.read(tmp_path / "s").documents == 5
