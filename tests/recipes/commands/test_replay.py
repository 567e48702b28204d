"""`draftsmith replay`: what a person gets for recorded answers."""

from __future__ import annotations

import json

import pytest

from draftsmith.infer.costs.identity import TargetIdentity
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.text.tokenizer import load_tokenizer, tokenizer_fingerprint

PROMPT = "what does the fox say to the lazy dog?"
KEYS = {"accepted_length", "acceptance_rate", "hit_rate", "nodes_per_step"}


@pytest.fixture
def replay(call, folders):
    def replay(data, drafters, *words):
        return call("replay", "--data", data, "--tokenizer", folders.target, "--drafters", drafters, *words, "--json")

    return replay


def test_token_ids_of_a_row_are_replayed_with_the_figures_counted_by_hand(replay, rows_file):
    """12 times token 7: two steps know nothing; then the latest match gives one node, and two tokens a step."""
    data = rows_file([{"prompt": "x", "output": "y", "prompt_token_ids": [9], "token_ids": [7] * 12}])
    found = replay(data, "pld[num_draft_tokens=4,matches=1,max_ngram=1]").json
    assert found["drafters"]["pld"]["accepted_length"] == 12 / 7
    assert found["drafters"]["pld"]["nodes_per_step"] == 5 / 7
    assert set(found["drafters"]["pld"]) >= KEYS
    assert (found["streams"], found["tokens"], found["temperature"]) == (1, 12, 0.0)


def test_coupled_drafts_are_refused_above_temperature_0_in_one_line(replay, folders, rows_file):
    data = rows_file([{"prompt": PROMPT, "output": PROMPT}])
    spec = f"small:{folders.draft}[sample=coupled],pld"
    told = replay(data, spec, "--temperature", 0.8)
    assert told.code == 2
    assert "outright drafts only" in told.err.splitlines()[-1]
    assert "[sample=likeliest]" in told.err.splitlines()[-1]
    assert "Traceback" not in told.err
    assert set(replay(data, spec).json["drafters"]) == {"small", "pld"}
    outright = f"small:{folders.draft}[sample=likeliest]"
    assert replay(data, outright, "--temperature", 0.8).json["drafters"]["small"]["nodes_per_step"] > 1
    assert replay(data, "pld", "--temperature", 0.8).json["drafters"]["pld"]["accepted_length"] > 1


def test_replay_of_the_target_s_own_greedy_answers_equals_decoding(call, replay, folders, rows_file, tmp_path):
    questions = rows_file([{"prompt": PROMPT}, {"prompt": "the dog, the dog, the dog"}, {"prompt": "why?"}])
    out = tmp_path / "answers.jsonl"
    told = call("answers", "--target", folders.target, "--data", questions, "--out", out, "--max_new_tokens", 40)
    assert told.code == 0
    drafters = f"pld,small:{folders.draft},tree=small:{folders.draft}[top_k=3]"
    replayed = replay(out, drafters).json["drafters"]
    words = ["--target", folders.target, "--data", questions, "--drafters", drafters, "--max_new_tokens", 40]
    decoded = call("bench", *words, "--warmup", 0, "--json").json["drafters"]
    for name in ("pld", "small", "tree"):
        for key in KEYS:
            assert replayed[name][key] == pytest.approx(decoded[name][key]), (name, key)
        assert replayed[name]["accepted_length"] > 1.2


def test_a_table_is_printed_for_people_and_bad_rows_are_counted(call, folders, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": PROMPT, "output": PROMPT}) + "\n{broken\n")
    words = ["--data", path, "--tokenizer", folders.target, "--drafters", "pld"]
    told = call("replay", *words)
    assert told.code == 2
    assert "row 2" in told.err
    told = call("replay", *words, "--on_bad", "skip")
    assert told.code == 0
    assert "1 skipped" in told.out
    assert "pld" in told.out


@pytest.mark.parametrize("drafters", ["", "oracle"])
def test_a_drafter_that_cannot_be_replayed_is_told_in_one_line(replay, rows_file, drafters):
    told = replay(rows_file([{"prompt": PROMPT, "output": "x"}]), drafters)
    assert told.code == 2
    assert "Traceback" not in told.err


LOGS = [
    {"prompt": f"{i}?", "prompt_token_ids": [100 + i], "output": "x", "created": 1_700_000_000 + 60 * i,
     "token_ids": [2, 3, 4, 5, 6, 7, 8, 9, 10 + i, 20 + i, 30 + i]}
    for i in range(10)
]  # fmt: skip


def test_the_earlier_part_is_indexed_and_the_later_replayed(replay, rows_file):
    """The rows stand in the file latest first; nine tokens of each answer are in all the others."""
    data = rows_file(LOGS[::-1])
    found = replay(data, "pld,rest", "--split", "time:0.8").json
    assert found["split"] == {"by": "time", "share": 0.8, "replayed_from": "2023-11-14T22:21:20+00:00",
                              "indexed_answers": 8, "indexed_tokens": 88, "replayed_answers": 2}  # fmt: skip
    assert (found["streams"], found["arrival"]) == (2, False)
    assert found["drafters"]["rest"]["accepted_length"] > 2 > found["drafters"]["pld"]["accepted_length"]
    assert found["drafters"]["rest"]["leakage"]["answers"] == 0
    assert found["drafters"]["pld"]["leakage"] is None
    told = replay(data, "rest", "--split", "rows:0.8").json["split"]
    assert (told["replayed_from"], told["by"]) == ("2023-11-14T22:14:20+00:00", "rows")


def test_answers_are_taken_in_as_they_arrive(replay, rows_file):
    """Each answer is given twice: the second time it is known, if the first one was taken in."""
    twice = [{**row, "created": row["created"] + 30 * k, "token_ids": [i, *row["token_ids"]]}
             for i, row in enumerate(LOGS) for k in range(2)]  # fmt: skip
    data = rows_file(twice)
    still = replay(data, "rest", "--split", "time:0.5").json["drafters"]["rest"]
    told = replay(data, "rest,mine=rest[nodes=4]", "--split", "time:0.5", "--arrival")
    moving = told.json["drafters"]["rest"]
    assert told.json["arrival"] is True
    assert still["leakage"]["answers"] == 0
    assert moving["leakage"]["answers"] == 5
    assert "already holds 5 of 10 answers verbatim" in told.err
    assert moving["accepted_length"] > moving["leakage"]["without"]["accepted_length"] > 2
    assert moving["accepted_length"] > still["accepted_length"]
    assert told.json["drafters"]["mine"]["nodes_per_step"] <= 4


def test_the_store_of_a_split_can_be_kept_and_named(call, replay, rows_file, tmp_path):
    data, out = rows_file(LOGS), tmp_path / "kept"
    split = replay(data, "rest", "--split", "rows:0.9", "--store_out", out).json["drafters"]["rest"]
    assert call("store", "info", out, "--json").json["documents"] == 9
    named = replay(rows_file(LOGS[9:], "later.jsonl"), f"rest:{out}").json["drafters"]["rest"]
    assert named["accepted_length"] == split["accepted_length"]
    again = replay(data, "rest", "--split", "rows:0.9", "--store_out", out)
    assert (again.code, "already exists" in again.err) == (2, True)
    whole = replay(data, f"rest:{out}")
    assert whole.json["drafters"]["rest"]["leakage"]["answers"] == 9
    assert "(90.0%" in whole.err


def test_costs_give_speedup_and_break_even_in_the_json_and_the_table(call, replay, folders, rows_file, tmp_path):
    tokenizer = tokenizer_fingerprint(load_tokenizer(folders.target))
    planned = TargetIdentity("bench-30M", "c0", 30_000_000, 300, tokenizer=tokenizer)
    passes = {"target": PassCost([1, 64, 512], [0.010, 0.012, 0.1])}
    costs = Costs(passes, 0.0005, {"device": "cpu", "name": "AMD EPYC", "threads": 2, "dtype": "bfloat16"}, planned)
    (tmp_path / "costs.json").write_text(json.dumps(costs.to_json()))
    data, words = rows_file(LOGS), ["--split", "rows:0.5", "--latency", tmp_path / "costs.json"]
    found = replay(data, "rest,pld", *words, "--batch_sizes", 1, 512).json["drafters"]["rest"]["predicted"]
    assert [one["batch_size"] for one in found["by_batch_size"]] == [1, 512]
    assert found["by_batch_size"][0]["speedup"] > 1.3 > 1 > found["by_batch_size"][1]["speedup"]
    assert 1 <= found["off_above"] < 512
    told = call("replay", "--data", data, "--tokenizer", folders.target, "--drafters", "rest,pld", *words)
    assert "Break-even, by batch size\n" in told.out
    heads = told.out.partition("Predicted speedup, by batch size\n")[2].splitlines()[0].split()
    assert heads == ["drafter", "1", "4", "8", "16", "32"], told.out
    assert "costs: bench-30M on AMD EPYC, 2 threads, bfloat16" in told.out
    assert "earlier answers (55 tokens) were indexed" in told.out


@pytest.mark.parametrize(
    "planned", [{"tokenizer": "of another model", "vocab_size": 300}, {"tokenizer": "", "vocab_size": 32000}]
)
def test_logs_are_not_priced_with_the_passes_of_another_target(replay, rows_file, tmp_path, planned):
    target = TargetIdentity("bench-30M", "c0", 30_000_000, **planned)
    costs = Costs({"target": PassCost([1, 64], [0.01, 0.02])}, 0.0, {"name": "AMD EPYC"}, target)
    (tmp_path / "costs.json").write_text(json.dumps(costs.to_json()))
    told = replay(rows_file(LOGS), "pld", "--latency", tmp_path / "costs.json")
    assert told.code == 2
    assert "holds the costs of bench-30M" in told.err.splitlines()[-1]
    assert "run `draftsmith plan` for the target of the logs" in told.err.splitlines()[-1]


def test_answers_of_several_turns_are_replayed_with_the_ids_that_were_emitted(
    call, replay, folders, rows_file, tmp_path
):
    questions = rows_file([{"question_id": 1, "category": "c", "turns": [PROMPT, "and why?"]}])
    out = tmp_path / "answers.jsonl"
    assert (
        call("answers", "--target", folders.target, "--data", questions, "--out", out, "--max_new_tokens", 9).code == 0
    )
    row = json.loads(out.read_text())
    found = replay(out, "pld").json
    assert (found["streams"], found["tokens"]) == (2, sum(map(len, row["token_ids_by_turn"])))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--split", "days:3"], "is not of the form time:0.9"),
        (["--split", "time:0.05"], "leaves nothing to index"),
        (["--store_out", "x"], "give --split as well"),
        (["--split", "rows:0.5", "--latency", "nowhere.json"], "nowhere.json does not exist"),
        ([], "drafter 'rest' has nothing to draft from but the answers that arrive: add --arrival"),
    ],
)
def test_what_cannot_be_split_is_told_in_one_line(replay, rows_file, words, line):
    told = replay(rows_file(LOGS), "rest", *words)
    assert told.code == 2
    assert line in told.err.splitlines()[-1]
    assert "Traceback" not in told.err


def test_rows_without_a_time_are_told_how_to_be_split(replay, rows_file):
    told = replay(rows_file([*LOGS, {**LOGS[0], "created": None}]), "rest", "--split", "time:0.5")
    assert (told.code, "rows:0.9" in told.err) == (2, True)


def test_the_last_sentence_says_when_the_best_drafter_pays(call, replay, folders, rows_file):
    data = rows_file([{"prompt": PROMPT, "output": "the dog, the dog, the dog, the dog"}])
    known = replay(data, "pld,empty")
    found = known.json["drafters"]["pld"]
    assert found["pays_if"]["limit"] == found["accepted_length"] > 1
    assert found["pays_if"]["speedup"] is None
    assert known.json["conclusion"]["drafter"] == "pld"
    words = ["--data", data, "--tokenizer", folders.target, "--drafters", "pld"]
    told = " ".join(call("replay", *words).out.split())
    assert told.endswith(f"costs less than {found['accepted_length']:.2f} plain ones.")


def test_a_machine_models_the_costs_and_every_result_says_so(call, replay, folders, rows_file):
    data = rows_file([{"prompt": PROMPT, "output": "the dog, the dog, the dog, the dog"}])
    words = ["--machine", "a100", "--target_config", folders.target, "--dtype", "bfloat16", "--batch_sizes", "1,2"]
    known = replay(data, f"pld,small:{folders.draft}", *words).json
    assert known["modelled"] == "modelled on an A100"
    assert "modelled on an A100" in known["costs"]
    assert "modelled on an A100" in known["conclusion"]["sentence"]
    for row in known["drafters"].values():
        facts, first = row["pays_if"], row["predicted"]["by_batch_size"][0]
        assert facts["speedup"] == pytest.approx(first["speedup"])
        assert facts["limit"] == pytest.approx(row["accepted_length"] - facts["propose_ratio"])
        assert first["break_even"] == pytest.approx(facts["pass_ratio"] + facts["propose_ratio"])
        # It pays if and only if the pass costs less than the limit.
        assert (facts["pass_ratio"] < facts["limit"]) == first["pays"]
    told = call("replay", "--data", data, "--tokenizer", folders.target, "--drafters", "pld", *words)
    assert "Predicted speedup (modelled on an A100), by batch size" in told.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--machine", "a100"], "--machine and --target_config belong together"),
        (["--target_config", "TARGET"], "--machine and --target_config belong together"),
        (["--machine", "a1000", "--target_config", "TARGET"], "unknown machine 'a1000'"),
        (["--machine", "a100", "--target_config", "TARGET", "--dtype", "float64"], "no figure for float64"),
    ],
)
def test_a_machine_that_cannot_be_modelled_is_refused_in_one_line(replay, folders, rows_file, words, expected):
    given = [folders.target if word == "TARGET" else word for word in words]
    told = replay(rows_file([{"prompt": PROMPT, "output": "x"}]), "pld", *given)
    assert told.code == 2
    assert expected in told.err.splitlines()[-1]
    assert "Traceback" not in told.err
