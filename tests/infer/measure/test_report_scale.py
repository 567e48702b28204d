"""A large run: 480 questions, 6 drafters, a million traces, in a process of its own."""

import gzip
import json
import random
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models

from draftsmith.infer.contract.trace import StepTrace, Tried
from draftsmith.infer.measure.answer_files import Answer, Choice, TraceRow, write_answers
from draftsmith.infer.measure.run_folder import RunFolder

QUESTIONS, STEPS, DRAFTERS = 480, 300, 6

MEASURE = """
import json, re, sys, time
from pathlib import Path
began = time.perf_counter()
from draftsmith.recipes.cli.main import run
code = run(["report", sys.argv[1]])
print(json.dumps({"code": code, "seconds": time.perf_counter() - began,
                  "peak_mb": int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024}))
"""


def write_large(folder: RunFolder, name: str, rng: random.Random) -> int:
    """Traces of every question as a drafter of chains leaves them; returns how many there are."""
    per_question = STEPS if name != "plain" else 700
    texts = []
    for length in range(1, 6):
        tried = [Tried(depth, name, 0.123456789, depth < length) for depth in range(1, 1 + min(length, 5))]
        sources = [name] * (length - 1) + ["target"]
        trace = StepTrace(
            "ROW", 0, 1, 0, 5, 5, 5, length - 1, length, tried if name != "plain" else [], {name: 5}, [], sources,
            0.0029241109996291925, 0.007278096000845835, 5.8306999562773854e-05, 0.0001722150000205147,
            0.007030978999864601, 0.002537177000704105, 80041984,
        )  # fmt: skip
        row = json.dumps(TraceRow(0, 0, 0, trace).to_json())
        texts.append(
            row.replace('"question_id": 0', '"question_id": QUESTION').replace('"context": 0', '"context": AT')
        )
    count, answers = 0, []
    folder.traces_path(name).parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder.traces_path(name), "wt", compresslevel=1) as traces:
        for question in range(QUESTIONS):
            written = 0
            for _ in range(per_question):
                length = 1 if name == "plain" else rng.randint(1, 5)
                row = texts[length - 1].replace("QUESTION", str(question)).replace("AT", str(40 + written))
                traces.write(row.replace('"ROW"', f'"{question}/0"') + "\n")
                written += length
            ids = [97 + (question + at * at) % 26 for at in range(written)]
            text = "".join(map(chr, ids))
            choice = Choice([text], [written], [written * 0.01], [per_question], [1.0], [ids])
            answers.append(Answer(question, f"category {question % 13}", name, [choice]))
            count += per_question
    write_answers(folder.answers_path(name), answers)
    return count


@pytest.mark.slow
def test_a_million_traces_make_a_small_page_in_seconds_and_little_memory(run_folder, tmp_path):
    drafters = [f"drafter{at}" for at in range(DRAFTERS)]
    vocab = {chr(letter): letter for letter in range(97, 123)} | {"?": 0}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.decoder = decoders.Fuse()
    (tmp_path / "target").mkdir()
    tokenizer.save(str(tmp_path / "target" / "tokenizer.json"))
    tasks = {f"category {at}": None for at in range(13)}

    def change(results):
        for row in results["drafters"].values():
            row["by_category"] = dict.fromkeys(tasks, next(iter(row["by_category"].values())))

    runners = {name: {"per_step": 3} for name in drafters}
    path = run_folder("large", runners, change=change, target=str(tmp_path / "target"))
    rng = random.Random(0)
    rows = sum(write_large(RunFolder(path), name, rng) for name in ["plain", *drafters])
    assert rows >= 1_000_000
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    page = path / "report.html"
    size = page.stat().st_size / 1e6
    print(f"{rows:,} traces: {found['seconds']:.1f} s, {found['peak_mb']:.0f} MB, page {size:.2f} MB")
    assert found["code"] == 0
    assert found["seconds"] < 20
    assert found["peak_mb"] < 1000
    assert size < 5
    html = page.read_text()
    assert html.count('class="example"') == DRAFTERS * 4
    assert html.count('class="d s') > 1000
