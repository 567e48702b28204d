"""`draftsmith answers --ray` as a process: stopped and killed, refused in one line, and what its workers cost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest

from draftsmith.infer.answers.answer_file import AnswerFile, with_keys
from draftsmith.infer.answers.sharded import answer_shards
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.files import ray_cluster
from draftsmith.infer.files.workers import InProcess, Workers, check_workers, open_workers
from draftsmith.infer.text.records import read_records
from draftsmith.recipes.cli.main import run
from draftsmith.recipes.commands.answers import _by_engine


@pytest.mark.parametrize(
    ("ray", "count", "line"),
    [
        ("nowhere", None, r"--ray 'nowhere': give `local`, or the HOST:PORT"),
        ("http://10.0.0.1:6379", None, "HOST:PORT"),
        ("10.0.0.1:port", None, "HOST:PORT"),
        ("127.0.0.1:9", None, r"no Ray cluster answers at 127\.0\.0\.1:9 .*refused"),
        (None, 2, "--ray_workers counts the workers of --ray"),
    ],
)
def test_workers_that_cannot_be_had_are_refused_quickly_in_one_line(ray: str | None, count: Any, line: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match=line) as refused:
        check_workers(ray, count)
    assert "\n" not in str(refused.value)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"\0\0"], ids=["silent", "ssh", "stuck"])
def test_what_listens_and_is_not_ray_is_refused_in_one_line(
    answer: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_cluster, "GREET_S", 1.0)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "1 + 1?"}\n')
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        held: list[socket.socket] = []

        def accept() -> None:
            held.append(listener.accept()[0])
            held[0].sendall(answer)

        thread = threading.Thread(target=accept)
        thread.start()
        words = ["answers", "--target", str(tmp_path), "--data", str(data), "--out", str(tmp_path / "out.jsonl")]
        began = time.monotonic()
        assert run([*words, "--ray", address]) == 2
        assert time.monotonic() - began < 10
        thread.join()
        held[0].close()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f"what listens at {address} is not Ray: give the HOST:PORT" in said[0]


def test_a_ray_that_does_not_start_is_one_line_and_leaves_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    folders = []

    def late(**given: Any) -> None:
        folders.append(Path(given["_temp_dir"]))
        assert folders[0].is_dir()
        raise RuntimeError("The current node timed out during startup.\nmore")

    monkeypatch.setattr(ray, "init", late)
    with (
        pytest.raises(ValueError, match=r"Ray did not start on this machine .*timed out") as refused,
        open_workers("local", 1),
    ):
        pass
    assert "\n" not in str(refused.value)
    assert not folders[0].exists()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"ray is not installed: pip install 'draftsmith\[ray\]'"):
        check_workers("local", 2)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["answers", "--server", "http://127.0.0.1:9", "--tokenizer", "T"], "a --server takes concurrent requests"),
        (["train", "sft", "--target", "T", "--num_layers", "1"], "this run reads none"),
        (["train", "distil", "--target", "T", "--num_layers", "1", "--teacher", "live"], "this run reads none"),
        (["train", "medusa", "--target", "T"], "this run reads none"),
        (["store", "build", "rest", "--tokenizer", "T", "--ray", "nowhere"], "HOST:PORT"),
        (["store", "build", "dresd", "--target", "T", "--ray", "nowhere"], "HOST:PORT"),
    ],
)
def test_what_has_no_shards_is_refused_with_ray(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "1 + 1?", "output": "2"}\n')
    given = [word if word != "T" else str(tmp_path) for word in words]
    more = [] if "--ray" in words else ["--ray", "local"]
    assert run([*given, *more, "--data", str(data), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert line in told[0]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("".join(json.dumps({"id": f"q{i}", "prompt": f"say {i}"}) + "\n" for i in range(400)))
    return path


RAYS = re.compile(rb"ray::|/ray/(core|_private|dashboard|autoscaler)/")


# Ray's own helpers of a machine look only now and then whether it is still there.
AGENTS = re.compile(rb"ray::(Dashboard|RuntimeEnv)Agent")


def rays_of(mark: str, but: re.Pattern[bytes] | None = None) -> set[int]:
    """Ray's processes that were started with this mark, by a process that may have ended."""
    found = set()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            marked = f"DRAFTSMITH_TEST={mark}".encode() in environ.read_bytes()
            command = environ.with_name("cmdline").read_bytes()
            if marked and RAYS.search(command) and not (but and but.search(command)):
                found.add(int(environ.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_ends_its_workers_and_resumes_to_the_same_bytes(
    folders: Any, questions: Path, tmp_path: Path, sent: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTSMITH_TEST", mark := f"{os.getpid()}-{sent}")
    out, whole = tmp_path / "answers.jsonl", tmp_path / "whole.jsonl"
    words = ["answers", "--target", str(folders.target), "--data", str(questions), "--max_new_tokens", "24",
             "--preset", "nucleus", "--batch_size", "4"]  # fmt: skip
    process = processes.Started(processes.COMMAND, *words, "--out", out, "--ray", "local", "--ray_workers", "2")
    until = time.monotonic() + 240
    left = out.with_name("answers.jsonl.part")
    while not any(path.stat().st_size for path in left.glob("*.jsonl")):
        assert process.poll() is None, process.stderr
        assert time.monotonic() < until
        time.sleep(0.01)
    assert len(rays_of(mark)) >= 4
    process.send_signal(sent)
    code = process.wait(60)
    assert code == (130 if sent == signal.SIGINT else -signal.SIGKILL), process.stderr
    assert "Traceback" not in process.stderr
    for seconds, but in ((30, AGENTS), (150, None)):
        until = time.monotonic() + seconds
        while rays_of(mark, but) and time.monotonic() < until:
            time.sleep(0.2)
        assert rays_of(mark, but) == set()
    assert run([*words, "--out", str(out)]) == 0
    assert run([*words, "--out", str(whole)]) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not left.exists()


# A process without Ray: it loads, answers two prompts, and then others from when one file is there until another is.


@pytest.mark.slow
def test_workers_take_hardly_more_cpu_than_one_process(folders: Any, questions: Path, tmp_path: Path) -> None:
    """CPU seconds of this process and of the workers' tasks: without the start of Ray and of the workers, which is
    constant, and without Ray's own processes. As many workers as cores, up to four: where several share a core, each
    interruption empties its caches, and the same work costs more, with Ray or without (LOG.md has the figures)."""
    asked = with_keys(read_records([questions], need="questions"))
    settings, how = Settings(temperature=0.7, seed=3), ("float32", "cpu", "token", False, 48, 4)
    opened = partial(_by_engine, str(folders.target), "", "chat", settings, *how)

    def spent(name: str, some: Workers, open_answer: Any) -> float:
        before, began = some.cpu_seconds, time.process_time()
        with AnswerFile(tmp_path / name, {}) as file:
            answer_shards(open_answer, asked, file, some, 4)
        return time.process_time() - began + (0.0 if some.in_process else some.cpu_seconds - before)

    answer = opened()
    alone = spent("one", InProcess(), lambda: answer)
    count = min(4, len(os.sched_getaffinity(0)))
    with open_workers("local", count) as workers:
        together = spent("many", workers, opened)
    print(f"CPU seconds: {alone:.1f} of one process, {together:.1f} of {count} workers, {together / alone:.3f}x")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()
    assert alone > 5
    assert together < 1.15 * alone


@pytest.mark.slow
def test_a_running_cluster_is_joined_and_left_running(word_tokenizer: Path, tmp_path: Path) -> None:
    """A head on loopback, as `ray start` starts it, and a store built on it with a relative path."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"id": f"r{i}", "text": f"number {i} is {i * i}; "}) + "\n" for i in range(600)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder = tempfile.mkdtemp(prefix="ray-")
    env = os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    words = ["start", "--head", "--block", "--port", address.split(":")[1], "--num-cpus", "1", "--temp-dir", folder,
             "--include-dashboard", "false", "--node-ip-address", "127.0.0.1"]  # fmt: skip
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    build = ["store", "build", "rest", "--data", "rows.jsonl", "--tokenizer", str(word_tokenizer)]
    build += ["--chunk_tokens", "3000"]
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                check_workers(address, None)
                break
            except ValueError:
                time.sleep(0.5)
        time.sleep(10)
        command = [sys.executable, "-c", processes.COMMAND, *build, "--out", "joined", "--ray", address]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert head.poll() is None
    finally:
        head.terminate()
        head.communicate(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
    assert run([*build[:4], str(data), *build[5:], "--out", str(tmp_path / "alone")]) == 0
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "joined").iterdir())
    for name in names:
        if name != "store.json":
            assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
