"""Exports are plain models with a truthful card; the Hub is spoken to as it wants, and hears of no secret."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from draftsmith.infer.models.load import load_model
from draftsmith.train.export.export import export_draft, save_model

TOKEN = "hf_" + "x" * 30


@pytest.fixture
def checkpoint(target_folder, tmp_path):
    """A sorted draft that is its target, with a run.json; the target has a licence."""
    model, tokenizer = load_model(str(target_folder), device="cpu")
    folder = tmp_path / "draft"
    folder.mkdir()
    target = tmp_path / "target"
    target.mkdir()
    (target / "README.md").write_text("---\nlicense: llama2\n---\n# Target\n")
    (target / "LICENSE.txt").write_text("as is")
    save_model(folder, model, tokenizer, exits=[1, 2, 4], template_fingerprint="abc")
    settings = {"target": str(target), "data": ["chats.jsonl"], "objective": {"name": "SoFT"},
                "watch": {"num_draft_tokens": 5}}  # fmt: skip
    run = {"settings": settings, "max_steps": 20, "results": {"accepted_length_exit_2": 2.345}, "date": "2026-01-02"}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.mark.parametrize("exit", [1, 2, 4])
def test_an_exit_is_a_smaller_model_with_the_logits_of_that_exit(checkpoint, tmp_path, exit):
    told = export_draft(str(checkpoint), tmp_path / "out", exit=exit)
    model = load_model(str(checkpoint), device="cpu")[0]
    short, tokenizer = load_model(str(tmp_path / "out"), device="cpu")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[exit]
        expected = model.lm_head(states if exit == 4 else model.model.norm(states))
        torch.testing.assert_close(short(ids).logits, expected, rtol=0, atol=1e-6)
    assert len(short.model.layers) == short.config.num_hidden_layers == exit
    assert told["exits"] == [e for e in (1, 2, 4) if e <= exit]
    assert short.config.template_fingerprint == "abc"
    assert tokenizer.chat_template


def test_the_card_tells_what_was_measured_and_carries_the_targets_licence(checkpoint, tmp_path):
    bench = tmp_path / "bench"
    bench.mkdir()
    figures = {"speedup": 1.5, "speedup_interval": [1.4, 1.6], "accepted_length": 2.5}
    (bench / "results.json").write_text(json.dumps({"drafters": {"plain": {}, "small": figures}}))
    export_draft(str(checkpoint), tmp_path / "out", exit=2, bench=str(bench))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: llama2\n")
    for fact in ("exit 2: accepted_length 2.35", "1.50x plain decoding (95 % interval 1.40 to 1.60)", "SoFT, 20 steps",
                 "assistant_model=draft", "vllm serve target"):  # fmt: skip
        assert fact in card
    assert str(tmp_path) not in card
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "as is"


def other_tokenizer(folder):
    """A target with another tokenizer: two of its words are exchanged."""
    vocab = json.loads((folder / "tokenizer.json").read_text())
    words = vocab["model"]["vocab"]
    one, two = sorted(words, key=words.__getitem__)[-2:]
    words[one], words[two] = words[two], words[one]
    (folder / "tokenizer.json").write_text(json.dumps(vocab))
    return folder


def test_a_target_with_another_tokenizer_is_refused(checkpoint, target_folder, tmp_path):
    same = shutil.copytree(target_folder, tmp_path / "same")
    told = export_draft(str(checkpoint), tmp_path / "out", target=str(same))
    assert told["compared"] is True
    other = other_tokenizer(shutil.copytree(target_folder, tmp_path / "other"))
    with pytest.raises(ValueError, match=r"cannot draft for .*other: .* has another tokenizer"):
        export_draft(str(checkpoint), tmp_path / "never", target=str(other))
    with pytest.raises(ValueError, match="does not exist, and is not a Hub name"):
        export_draft(str(checkpoint), tmp_path / "never", target="/no/such/target")
    assert not (tmp_path / "never").exists()


def test_the_card_claims_no_speedup_that_was_not_measured(checkpoint, target_folder, tmp_path):
    same = shutil.copytree(target_folder, tmp_path / "same")
    export_draft(str(checkpoint), tmp_path / "out", target=str(same))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No speedup was measured." in card
    assert "makes the target faster" not in card
    assert "accepted_length 2.35 (held-out prompts, chain of 5, with `target` as the target)" in card
    assert "not compared" not in card
    assert "began as the target's:" not in card, "run.json does not say so"
    told = export_draft(str(checkpoint), tmp_path / "hub", target="me/elsewhere", reach=False)
    assert told["compared"] is False
    assert "tokenizer was not compared with that of `me/elsewhere`" in (tmp_path / "hub" / "README.md").read_text()


def test_figures_of_another_target_do_not_reach_the_card_and_few_questions_give_no_interval(checkpoint, tmp_path):
    bench = tmp_path / "bench"
    bench.mkdir()
    figures = {"speedup": 2.78, "speedup_interval": [2.78, 2.78], "accepted_length": 2.5, "pairs": 2}
    rows = {"plain": {}, "small": figures, "pld": figures}
    (bench / "results.json").write_text(json.dumps({"drafters": rows, "questions": 2}))
    config = {"target": str(tmp_path / "target"), "drafters": f"small:{checkpoint},pld", "batch_size": 4}
    (bench / "run.json").write_text(json.dumps({"config": config, "hardware": {"cpu": {"model": "Z80"}}}))
    export_draft(str(checkpoint), tmp_path / "out", bench=str(bench))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Benchmark with `target`, on Z80, 2 questions, batch_size 4:" in card
    assert "`small (draft)`: 2.78x plain decoding (too few questions for an interval)" in card
    assert "`pld" not in card
    config["target"] = "org/another"
    (bench / "run.json").write_text(json.dumps({"config": config}))
    with pytest.raises(ValueError, match="measured the target org/another, not"):
        export_draft(str(checkpoint), tmp_path / "never", bench=str(bench))


def test_for_vllm_it_writes_one_exit_and_the_line_that_serves_it(checkpoint, tmp_path):
    told = export_draft(str(checkpoint), tmp_path / "out", exit=2, engine="vllm", dtype="bfloat16", name="me/draft")
    config = json.loads((tmp_path / "out" / "speculative_config.json").read_text())
    assert config == {"method": "draft_model", "model": "me/draft", "num_speculative_tokens": 5}
    assert told["serve"].startswith("vllm serve ")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["dtype"] == "bfloat16"
    assert "sorted_exits" not in stored


def test_a_published_draft_is_left_where_it_is_said_to_be_sorted(target_folder, tmp_path):
    export_draft(str(target_folder), tmp_path / "out", exit=2, exits=[2, 3, 4], target="me/target")
    assert load_model(str(tmp_path / "out"), device="cpu")[0].config.num_hidden_layers == 2
    assert "look it up before you publish" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match="depth, 4 layers"):
        export_draft(str(target_folder), tmp_path / "other", exit=2, exits=[2, 3], target="me/target")


def test_the_licence_of_a_target_on_the_hub_is_taken_from_there(checkpoint, tmp_path, monkeypatch):
    asked = []

    def stored(name, allow_patterns, local_files_only):
        asked.append((name, local_files_only))
        return str(tmp_path / "target")

    monkeypatch.setattr("huggingface_hub.snapshot_download", stored)
    told = export_draft(str(checkpoint), tmp_path / "out", target="me/target", reach=False)
    assert told["licence"] == {"license": "llama2"}
    assert told["licence_files"] == ["LICENSE.txt"]
    assert asked == [("me/target", True)]


def test_a_peft_adapter_is_merged_into_its_base(target_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    base, _ = load_model(str(target_folder), device="cpu")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    adapted.eval().save_pretrained(tmp_path / "adapter")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = adapted(ids).logits
    export_draft(str(tmp_path / "adapter"), tmp_path / "out", target="me/target")
    merged = load_model(str(tmp_path / "out"), device="cpu")[0]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-5)


def test_wrong_exits_full_folders_and_unknown_targets_are_refused(checkpoint, target_folder, tmp_path):
    with pytest.raises(ValueError, match="has no exit 3: it was trained at 1, 2, 4"):
        export_draft(str(checkpoint), tmp_path / "out", exit=3)
    with pytest.raises(ValueError, match="is not empty"):
        export_draft(str(checkpoint), checkpoint)
    with pytest.raises(ValueError, match="give --target"):
        export_draft(str(target_folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's API as an upload uses; what it was told is kept on the server."""

    def log_message(self, *args):
        pass

    def _answer(self, value, code=200):
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        self._answer({"id": "me/draft", "sha": "0" * 40, "siblings": [], "private": True, "tags": [], "downloads": 0})

    def do_PUT(self):
        body = self._body()
        self.server.blobs[hashlib.sha256(body).hexdigest()] = len(body)
        self._answer({})

    def do_POST(self):
        body = self._body()
        self.server.tokens.add(self.headers.get("Authorization"))
        host = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self._answer({"url": f"{host}/me/draft", "name": "me/draft", "id": "1"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            lfs = [{"path": f["path"], "uploadMode": "lfs" if "safetensors" in f["path"] else "regular",
                    "shouldIgnore": False} for f in files]  # fmt: skip
            self._answer({"files": lfs})
        elif self.path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            had = self.server.blobs
            for wanted in objects:
                if wanted["oid"] not in had:
                    self.server.asked += 1
                    wanted["actions"] = {"upload": {"href": f"{host}/lfs/{wanted['oid']}", "header": {}}}
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            if self.server.broken:
                self.server.broken = False
                self._answer({"error": "try again later"}, 400)
                return
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.committed = [line["value"]["path"] for line in lines if line["key"] != "header"]
            self._answer({"commitUrl": f"{host}/me/draft/commit/1", "commitOid": "1" * 40, "success": True})
        else:
            self._answer({})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.blobs, server.tokens, server.committed, server.created = {}, set(), [], {}
    server.broken, server.asked = True, 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


COMMANDS = """
import contextlib, io, json, sys
from draftsmith.recipes.cli.main import run
for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = run(json.loads(line))
    print(json.dumps({"returncode": code, "stdout": out.getvalue(), "stderr": err.getvalue()}), flush=True)
"""


def test_upload_is_private_resumes_after_a_break_and_tells_no_token(checkpoint, tmp_path, hub):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
           "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    words = ["export", str(checkpoint), "--exit", "2", "--hub", "me/draft"]

    # huggingface_hub reads these variables as it is imported: hence a process, one for all three commands.
    with subprocess.Popen(
        [sys.executable, "-c", COMMANDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as process:

        def run(*more):
            process.stdin.write(json.dumps([*words, *more]) + "\n")
            process.stdin.flush()
            return types.SimpleNamespace(**json.loads(process.stdout.readline()))

        dry = run("--dry_run")
        assert dry.returncode == 0, dry.stderr
        assert "would upload" in dry.stdout
        assert hub.created == {}

        broken = run("--out", str(tmp_path / "out"))
        assert broken.returncode == 2
        assert "the upload failed" in broken.stderr.splitlines()[-1]
        assert hub.created.get("private") is True or hub.created["visibility"] == "private"
        assert hub.asked == 1

        done = run()
        assert done.returncode == 0, done.stderr
        process.stdin.close()
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(hub.committed)
    assert hub.asked == 1, "the weights were sent a second time"
    assert any(TOKEN in (told or "") for told in hub.tokens)
    assert TOKEN not in "".join(each.stdout + each.stderr for each in (dry, broken, done))
