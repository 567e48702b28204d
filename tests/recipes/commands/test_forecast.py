"""`draftsmith forecast`, from answers with log-probabilities, from a target, and from a server's log."""

from __future__ import annotations

import json

import pytest

from draftsmith.infer.costs.identity import TargetIdentity
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.text.tokenizer import load_tokenizer, tokenizer_fingerprint

PROMPTS = [f"what does the fox say to the {dog} dog?" for dog in ("lazy", "quick", "brown", "big", "old")]


@pytest.fixture
def drawn(call, folders, rows_file, tmp_path):
    """Answers drawn at temperature 0.8, with log-probabilities."""
    questions = rows_file([{"prompt": prompt} for prompt in PROMPTS] * 2, "questions.jsonl")
    out = tmp_path / "answers.jsonl"
    told = call(
        "answers", "--target", folders.target, "--data", questions, "--out", out, "--temperature", 0.8, "--top_p", 0.95,
        "--max_new_tokens", 12, "--logprobs", "--seed", 3,
    )  # fmt: skip
    assert told.code == 0, told.err
    return out


def lengths(told, name="small", rule="token"):
    return [row["accepted_length"] for row in told.json["drafters"][name][rule]]


def test_logs_and_the_target_give_the_same_forecast(call, folders, drawn):
    row = json.loads(drawn.read_text().splitlines()[0])
    assert row["logprobs_mode"] == "processed_logprobs"
    assert (row["sampling"]["temperature"], row["sampling"]["top_p"]) == (0.8, 0.95)
    assert len(row["logprobs"]) == len(row["token_ids"])
    words = ["--data", drawn, "--drafters", f"small:{folders.draft}", "--lengths", 1, 2, 4]
    logged = call("forecast", *words, "--json")
    computed = call("forecast", *words, "--target", folders.target, "--json")
    assert (logged.json["logprobs"], computed.json["logprobs"]) == ("logged", "computed")
    for rule in ("token", "block"):
        assert lengths(logged, rule=rule) == pytest.approx(lengths(computed, rule=rule), abs=1e-3)
        assert 1 < lengths(logged, rule=rule)[0] < lengths(logged, rule=rule)[1] < lengths(logged, rule=rule)[2] < 5
    assert lengths(logged, rule="block")[2] > lengths(logged)[2]
    assert (logged.json["texts"], logged.json["max_new_tokens"]) == (10, 12)


def test_a_table_fits_80_columns_and_says_which_length_pays(call, folders, drawn, tmp_path, monkeypatch):
    tokenizer = tokenizer_fingerprint(load_tokenizer(folders.target))
    target = TargetIdentity("bench", "c0", 30_000_000, 300, tokenizer=tokenizer)
    passes = {"target": PassCost([1, 512], [0.010, 0.1]), "small": PassCost([1, 512], [0.0005, 0.05])}
    costs = Costs(passes, 0.0005, {"device": "cpu", "name": "CPU", "threads": 2, "dtype": "float32"}, target)
    (tmp_path / "costs.json").write_text(json.dumps(costs.to_json()))
    monkeypatch.setenv("COLUMNS", "80")
    words = ["--data", drawn, "--drafters", f"small:{folders.draft}", "--latency", tmp_path / "costs.json"]
    told = call("forecast", *words)
    assert told.code == 0, told.err
    assert max(map(len, told.out.splitlines())) <= 80
    assert "10 answers" in told.out
    assert "temperature 0.8, top_p 0.95" in told.out
    assert told.out.count("*") == 5 + 1  # one for each batch size, and what it means
    assert "batch 1: small, chains of" in told.out
    found = call("forecast", *words, "--rule", "token", "--batch_sizes", 1, 8, "--json").json
    assert [one["rule"] for one in found["best"]] == ["token"] * 2
    assert list(found["drafters"]["small"]) == ["token"]


def test_a_server_s_raw_log_is_used_at_temperature_1_only(call, folders, drawn, rows_file):
    """vLLM's chat completions with logprobs and token ids."""

    def log(temperature):
        rows = [json.loads(line) for line in drawn.read_text().splitlines()]
        return [
            {"request": {"messages": [{"role": "user", "content": row["prompt"]}], "temperature": temperature},
             "response": {"prompt_token_ids": row["prompt_token_ids"], "choices": [
                 {"message": {"role": "assistant", "content": row["output"]}, "token_ids": row["token_ids"],
                  "logprobs": {"content": [{"token": "x", "logprob": one} for one in row["logprobs"]]}}]}}
            for row in rows if row["output"].strip()
        ]  # fmt: skip

    words = ["--drafters", f"small:{folders.draft}", "--lengths", 2]
    warm = call("forecast", "--data", rows_file(log(1.0), "warm.jsonl"), *words, "--json")
    assert 1 < lengths(warm)[0] < 3
    cool = ["forecast", "--data", rows_file(log(0.8), "cool.jsonl"), *words]
    told = call(*cool, "--json")
    assert told.code == 2
    assert "may be raw" in told.err
    assert 1 < lengths(call(*cool, "--logprobs_mode", "processed", "--json"))[0] < 3


@pytest.mark.parametrize(
    ("words", "problem"),
    [(["--drafters", "pld"], "draftsmith replay"),
     (["--drafters", ""], "give --drafters"),
     (["--drafters", "small:{draft}", "--temperature", "0.5"], "--temperature 0.5 was given"),
     (["--drafters", "small:{draft}", "--max_new_tokens", "3"], "more than max_new_tokens"),
     (["--drafters", "small:{stranger}", "--target", "{target}"], "another tokenizer")],
)  # fmt: skip
def test_what_cannot_be_forecast_is_one_line(call, folders, drawn, words, problem):
    places = {"draft": folders.draft, "stranger": folders.stranger, "target": folders.target}
    told = call("forecast", "--data", drawn, *(word.format(**places) for word in words))
    assert told.code == 2
    assert problem in told.err.splitlines()[-1]
    assert "Traceback" not in told.err


def test_answers_keep_log_probabilities_of_drawn_tokens_only(call, folders, rows_file, tmp_path):
    data, out = rows_file([{"prompt": PROMPTS[0]}]), tmp_path / "out.jsonl"
    told = call("answers", "--target", folders.target, "--data", data, "--out", out, "--logprobs")
    assert (told.code, "--temperature" in told.err) == (2, True)
    words = ["--server", "http://x", "--tokenizer", folders.target, "--logprobs"]
    told = call("answers", *words, "--data", data, "--out", out)
    assert (told.code, "--target" in told.err) == (2, True)


def test_answers_say_at_what_temperature_they_were_drawn(call, folders, rows_file, tmp_path):
    data = rows_file([{"prompt": prompt} for prompt in PROMPTS])
    words = ["--drafters", f"small:{folders.draft}", "--lengths", 2]
    for name, more, sampling in (
        ("greedy", [], {"temperature": 0.0}),
        ("drawn", ["--preset", "nucleus", "--seed", 3], {"temperature": 0.7, "top_p": 0.95, "seed": 3}),
    ):
        out = tmp_path / f"{name}.jsonl"
        made = call("answers", "--target", folders.target, "--data", data, "--out", out, "--max_new_tokens", 8, *more)
        assert made.code == 0, made.err
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["sampling"] for row in rows] == [sampling] * len(PROMPTS)
        found = call("forecast", "--data", out, *words, "--target", folders.target, "--json")
        assert found.code == 0, found.err
        assert found.json["sampling"]["temperature"] == sampling["temperature"]
        assert found.json["logprobs"] == ("computed" if sampling["temperature"] else "none")


def test_replay_forecasts_drawn_chains(call, folders, drawn, rows_file):
    words = ["--tokenizer", folders.target, "--temperature", 0.8]
    specs = f"pld,small:{folders.draft}[sample=true,top_k=1,num_draft_tokens=3]"
    found = call("replay", "--data", drawn, "--drafters", specs, *words, "--json").json
    assert list(found["drafters"]) == ["pld"]
    same = call("forecast", "--data", drawn, "--drafters", f"small:{folders.draft}", "--lengths", 1, 2, 3, "--json")
    assert found["forecast"]["drafters"] == same.json["drafters"]
    alone = ["replay", "--data", drawn, "--drafters", specs.removeprefix("pld,"), *words]
    found = call(*alone, "--json").json
    assert (found["drafters"], found["conclusion"]) == ({}, None)
    assert found["forecast"]["drafters"] == same.json["drafters"]
    told = call(*alone)
    assert told.code == 0, told.err
    assert "accepted_length of small" in told.out
    bare = rows_file([{"prompt": PROMPTS[0], "output": PROMPTS[1]}])
    told = call("replay", "--data", bare, "--drafters", specs, *words)
    assert (told.code, "no log-probabilities" in told.err) == (2, True)


def test_trees_and_greedy_answers_are_forecast_as_replay_counts_them(call, folders, rows_file, tmp_path):
    questions, out = rows_file([{"prompt": prompt} for prompt in PROMPTS], "questions.jsonl"), tmp_path / "a.jsonl"
    told = call("answers", "--target", folders.target, "--data", questions, "--out", out, "--max_new_tokens", 12)
    assert told.code == 0, told.err
    words = ["--data", out, "--drafters", f"small:{folders.draft}", "--lengths", 2, "--temperature", 0]
    found = call("forecast", *words, "--trees", "3-1,6x3", "--json").json
    assert (found["logprobs"], list(found["drafters"]["small"])) == ("none", ["token"])
    fixed, grown = found["trees"]["small"]
    options = "top_k=1,num_draft_tokens=2,min_confidence=0", "num_draft_tokens=3,nodes=6"
    specs = ",".join(
        f"{name}=small:{folders.draft}[{given},costs=none,calibration=none]"
        for name, given in zip(("chain", "tree"), options)
    )
    replayed = call("replay", "--data", out, "--tokenizer", folders.target, "--drafters", specs, "--json").json
    chain = found["drafters"]["small"]["token"][0]["accepted_length"]
    assert chain == pytest.approx(replayed["drafters"]["chain"]["accepted_length"])
    assert grown["accepted_length"] == pytest.approx(replayed["drafters"]["tree"]["accepted_length"], abs=0.02)
    assert fixed["accepted_length"] > 1
    shown = call("forecast", *words, "--trees", "3-1,6x3")
    assert "by tree of likeliest tokens" in shown.out
    assert "any rule" in shown.out


def test_a_forecast_file_is_priced_by_plan_and_shown_by_report(call, folders, drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "forecast.json"
    words = ["--data", drawn, "--drafters", f"small:{folders.draft}", "--lengths", 1, 3, "--trees", "2-1"]
    assert call("forecast", *words, "--out", path).code == 0
    plan = ["plan", "--target", folders.target, "--machine", "h100", "--contexts", 8, 16, "--trees", "3x2"]
    plan += ["--lengths", 2, "--forecast", path]
    told = call(*plan, "--json")
    batches = told.json["forecast"]["by_batch_size"]
    assert [batch["batch_size"] for batch in batches] == [1, 2, 4, 8, 16, 32]
    assert set(batches[0]["rules"]) == {"token", "block", "tree"}
    assert list(told.json["shapes"]) == list(told.json["forecast"]["draft_shapes"].values())
    shown = call(*plan)
    assert "What would pay, by batch size: forecast from 10 answers" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    run = tmp_path / "run"
    asked = ["--target", folders.target, "--data", drawn.parent / "questions.jsonl", "--drafters", "pld", "--limit", 1]
    assert call("bench", *asked, "--max_new_tokens", 4, "--out", run).code == 0
    (tmp_path / "plan.json").write_text(told.out)
    made = call("report", run, "--forecast", tmp_path / "plan.json")
    assert made.code == 0, made.err
    assert "What would pay at which batch size" in (run / "report.html").read_text()
    bare = call("report", run, "--forecast", path)
    assert (bare.code, "add --latency" in bare.err) == (2, True)
    strange = call("plan", "--target", folders.stranger, *plan[3:])
    assert (strange.code, "another tokenizer" in strange.err) == (2, True)
