"""Answer files against a base: the traps of Spec-Bench's two reports, and its formulas by hand."""

import io
import json
import random

import pytest
from rich.console import Console

from draftsmith.infer.costs.identity import TargetIdentity
from draftsmith.infer.measure.compare import compare
from draftsmith.infer.measure.runners import Question
from draftsmith.infer.measure.tables import compare_tables, show


def row(question_id, *, turns=("answer",), tokens=(10,), seconds=(1.0,), lengths=(), category="qa", **extra):
    choice = {
        "index": 0,
        "turns": list(turns),
        "decoding_steps": [5] * len(turns),
        "new_tokens": list(tokens),
        "wall_time": list(seconds),
        "accept_lengths": list(lengths),
    }
    choice |= {key: extra.pop(key) for key in ("token_ids",) if key in extra}
    return {"question_id": question_id, "category": category, "model_id": "m", "choices": [choice], **extra}


@pytest.fixture
def against(tmp_path):
    """Compare two lists of rows by way of files; gives the whole report and the one other's."""

    def run(base, other):
        for name, rows in (("base", base), ("other", other)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        report = compare(tmp_path / "base.jsonl", [tmp_path / "other.jsonl"])
        (details,) = report["others"].values()
        return report, details

    return run


class TestEquality:
    def test_a_file_equals_itself(self, against):
        rows = [row(i, turns=(f"a{i}", f"b{i}"), tokens=(1, 2), seconds=(1, 1)) for i in range(80)]
        report, details = against(rows, rows)
        assert (report["equal"], report["total"]) == (80, 80)
        assert report["speedup"] == 1.0
        assert report["speedup_interval"] == (1.0, 1.0)
        assert details["differences"] == []

    def test_eighty_lines_are_not_equal_to_their_own_first_five(self, against):
        rows = [row(i) for i in range(80)]
        report, details = against(rows, rows[:5])
        assert (report["equal"], report["total"]) == (5, 80)
        assert [one["by"] for one in details["differences"]] == ["missing"] * 75

    def test_five_lines_are_not_equal_to_the_eighty_they_began(self, against):
        rows = [row(i) for i in range(80)]
        report, details = against(rows[:5], rows)
        assert (report["equal"], report["total"]) == (5, 80)
        assert [one["by"] for one in details["differences"]] == ["extra"] * 75

    def test_the_order_of_lines_means_nothing(self, against):
        rows = [row(i, turns=(f"answer {i}",)) for i in range(20)]
        mixed = random.Random(1).sample(rows, len(rows))
        report, _ = against(rows, mixed)
        assert (report["equal"], report["total"]) == (20, 20)

    @pytest.mark.parametrize("side", ["base", "other", "both"])
    def test_a_question_that_is_there_twice_is_a_difference(self, against, side):
        rows, double = [row(1), row(2)], [row(1), row(2), row(2)]
        base, other = (double if side != "other" else rows), (double if side != "base" else rows)
        report, details = against(base, other)
        assert (report["equal"], report["total"]) == (1, 2)
        assert details["differences"][0]["by"] == "duplicated"
        assert details["pairs"] == 1

    def test_the_first_differing_character_is_shown_in_its_context(self, against):
        _, details = against([row(7, turns=("The cat sat.",))], [row(7, turns=("The car sat.",))])
        assert details["differences"] == [
            {
                "question_id": 7,
                "choice": 0,
                "turn": 0,
                "by": "text",
                "index": 6,
                "base": "The cat sat.",
                "other": "The car sat.",
            }
        ]

    def test_the_second_turn_is_compared_too(self, against):
        base = row(1, turns=("same", "one"), tokens=(1, 1), seconds=(1, 1))
        other = row(1, turns=("same", "two"), tokens=(1, 1), seconds=(1, 1))
        report, details = against([base], [other])
        assert report["equal"] == 0
        assert (details["differences"][0]["turn"], details["differences"][0]["index"]) == (1, 0)

    def test_a_missing_turn_is_a_difference(self, against):
        base = row(1, turns=("same", "more"), tokens=(1, 1), seconds=(1, 1))
        _, details = against([base], [row(1, turns=("same",))])
        assert details["differences"][0]["by"] == "turns"

    def test_token_ids_decide_where_both_have_them(self, against):
        """The same text from other tokens is a difference; other text from the same tokens is not."""
        base = [row(1, token_ids=[[1, 2, 3]]), row(2, turns=("a",), token_ids=[[4]])]
        other = [row(1, token_ids=[[1, 5, 3]]), row(2, turns=("a ",), token_ids=[[4]])]
        report, details = against(base, other)
        assert (report["equal"], report["total"]) == (1, 2)
        (found,) = details["differences"]
        assert (found["by"], found["index"], found["base"], found["other"]) == ("token_ids", 1, 2, 5)

    def test_text_decides_where_one_file_has_no_token_ids(self, against):
        report, _ = against([row(1)], [row(1, token_ids=[[1, 2]])])
        assert report["equal"] == 1

    def test_an_answer_that_goes_on_is_a_difference(self, against):
        _, details = against([row(1, turns=("answer",))], [row(1, turns=("answer!",))])
        assert details["differences"][0]["index"] == 6

    def test_a_number_and_its_text_are_one_id(self, against):
        report, _ = against([row(81)], [row("81")])
        assert (report["equal"], report["total"]) == (1, 1)


class TestErrors:
    def test_a_row_with_an_error_is_neither_equal_nor_a_pair(self, against):
        failed = {"question_id": 2, "category": "qa", "choices": [], "error": "RuntimeError: no"}
        report, details = against([row(1), row(2)], [row(1), failed])
        assert (report["equal"], report["total"]) == (1, 2)
        assert (details["errors"], details["pairs"]) == (1, 1)
        assert details["error_list"] == [{"question_id": 2, "other": "RuntimeError: no"}]

    def test_the_same_error_on_both_sides_is_not_equality(self, against):
        failed = {"question_id": 1, "error": "RuntimeError: no"}
        report, details = against([failed], [failed])
        assert (report["equal"], report["total"], details["errors"]) == (0, 1, 1)
        assert report["speedup"] is None

    def test_borrowed_figures_of_a_failed_turn_do_not_count(self, against):
        """Spec-Bench writes ERROR with the figures of the question before: 1000 tokens that nobody decoded."""
        base = [row(1), row(2)]
        other = [row(1), row(2, turns=("ERROR",), tokens=(1000,))]
        report, details = against(base, other)
        assert details["errors"] == 1
        assert report["speedup"] == 1.0


class TestSpeed:
    BASE = (
        row(1, tokens=(10, 10), seconds=(1.0, 1.0), turns=("a", "b"), category="writing", lengths=[1] * 20),
        row(2, tokens=(30,), seconds=(1.0,), category="math", lengths=[1] * 30),
        row(3, tokens=(10,), seconds=(2.0,), category="translation", lengths=[1] * 10),
    )
    OTHER = (
        row(1, tokens=(10, 10), seconds=(0.5, 0.5), turns=("a", "b"), category="writing", lengths=[4, 4, 4, 4, 4]),
        row(2, tokens=(30,), seconds=(0.5,), category="math", lengths=[3] * 10),
        row(3, tokens=(10,), seconds=(4.0,), category="translation", lengths=[1] * 10),
    )

    def test_spec_benchs_ratio_of_mean_rates_by_hand(self, against):
        """Rates 10, 30, 5 against 20, 60, 2.5: the means are 15 and 27.5."""
        _, details = against(self.BASE, self.OTHER)
        found = details["spec_bench"]
        assert found["base_tokens_per_s"] == pytest.approx(15)
        assert found["tokens_per_s"] == pytest.approx(27.5)
        assert found["speedup"] == pytest.approx(27.5 / 15)

    def test_our_ratio_of_sums_by_hand(self, against):
        """60 tokens in 5.5 s against 60 in 5 s: all in all it was slower, whatever the mean of rates says."""
        report, details = against(self.BASE, self.OTHER)
        assert report["speedup"] == pytest.approx((60 / 5.5) / (60 / 5))
        assert details["tokens_per_s"] == pytest.approx(60 / 5.5)
        assert report["speedup_interval"] is None, "three questions"

    def test_the_interval_of_eight_questions_holds_the_speedup(self, against):
        report, _ = against(
            [row(i, tokens=(10 + i,), seconds=(1.0 + i / 9,)) for i in range(8)],
            [row(i, tokens=(10 + i,), seconds=(0.5 + i / 30,)) for i in range(8)],
        )
        low, high = report["speedup_interval"]
        assert low < report["speedup"] < high

    def test_mt_bench_is_one_task_and_the_others_their_own(self, against):
        """MT-Bench: rates 10, 30 against 20, 60, exactly twice as fast; translation: half as fast."""
        _, details = against(self.BASE, self.OTHER)
        tasks = details["by_category"]
        assert list(tasks) == ["mt_bench", "translation"]
        assert tasks["mt_bench"]["spec_bench"]["speedup"] == pytest.approx(2)
        assert tasks["mt_bench"]["speedup"] == pytest.approx(2)
        assert tasks["mt_bench"]["speedup_interval"] is None
        assert tasks["translation"]["speedup"] == pytest.approx(0.5)
        assert tasks["translation"]["speedup_interval"] is None

    def test_the_mean_accepted_length_pools_all_steps(self, against):
        """20 tokens in 5 steps, 30 in 10, 10 in 10."""
        _, details = against(self.BASE, self.OTHER)
        assert details["accepted_length"] == pytest.approx(60 / 25)
        assert details["base_accepted_length"] == 1.0
        assert details["by_category"]["mt_bench"]["accepted_length"] == pytest.approx(50 / 15)

    def test_both_sides_are_counted_by_their_own_token_counts_and_not_by_their_text(self, against):
        """Spec-Bench counts the base again from its text. The same counts and seconds are the same speed here."""
        report, _ = against([row(1, turns=("x" * 500,))], [row(1, turns=("y",))])
        assert report["speedup"] == 1.0

    def test_only_questions_in_both_files_are_compared_for_speed(self, against):
        slow = row(9, tokens=(1,), seconds=(100.0,))
        report, details = against([row(1), row(2), slow], [row(1), row(2)])
        assert report["speedup"] == 1.0
        assert details["pairs"] == 2

    def test_without_figures_there_is_equality_and_no_speed(self, against):
        bare = {"question_id": 1, "choices": [{"index": 0, "turns": ["a"]}]}
        report, _ = against([bare], [bare])
        assert (report["equal"], report["speedup"], report["speedup_interval"]) == (1, None, None)


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path):
        answers = tmp_path / "run" / "answers"
        answers.mkdir(parents=True)
        for name, seconds in (("plain", 1.0), ("pld", 0.5), ("rest%3Astore", 2.0)):
            (answers / f"{name}.jsonl").write_text(json.dumps(row(1, seconds=(seconds,))) + "\n")
        return tmp_path / "run"

    @pytest.mark.parametrize("again", [False, True])
    def test_a_run_folder_alone_is_compared_with_its_own_plain_answers(self, folder, again):
        report = compare(folder, [folder] if again else [])
        assert {name: one["speedup"] for name, one in report["others"].items()} == {"pld": 2.0, "rest:store": 0.5}

    def test_several_others_add_up_in_equality_and_have_no_common_speedup(self, folder):
        report = compare(folder, [])
        assert (report["equal"], report["total"], report["speedup"]) == (2, 2, None)

    def test_a_file_may_be_the_base_of_a_folder(self, folder):
        report = compare(folder / "answers" / "pld.jsonl", [folder])
        assert set(report["others"]) == {"plain", "rest:store"}

    def test_what_cannot_be_compared_is_one_clear_line(self, folder, tmp_path):
        with pytest.raises(ValueError, match="no such answer file or run folder"):
            compare(tmp_path / "nothing.jsonl", [folder])
        with pytest.raises(ValueError, match="is no run folder"):
            compare(folder, [folder / "answers"])
        with pytest.raises(ValueError, match="nothing to compare it with"):
            compare(folder / "answers" / "pld.jsonl", [])
        (folder / "answers" / "plain.jsonl").unlink()
        with pytest.raises(ValueError, match=r"no answers/plain\.jsonl"):
            compare(folder, [])

    def test_a_malformed_file_is_named_with_its_row(self, folder):
        path = folder / "answers" / "pld.jsonl"
        path.write_text(path.read_text() + '{"question_id": 2}\n')
        with pytest.raises(ValueError, match=r"pld\.jsonl, row 2: choices is missing"):
            compare(folder, [])


class TestRuns:
    """Runs of one target on other machines, under other loads, with other settings, of other targets."""

    @pytest.fixture
    def run(self, run_folder):
        """A run in which pld is `gain` times faster than plain, on a machine that is `slow` times slower."""

        def write(name, *, gain=2, slow=1.0, **config):
            runners = {"pld": {"per_step": gain, "step_s": slow, "prefill_s": 0.5 * slow}}
            return run_folder(name, runners, plain={"step_s": slow, "prefill_s": 0.5 * slow}, **config)

        return write

    def test_a_run_on_a_slower_machine_keeps_the_speedup_that_it_measured(self, run):
        fast, slow = run("fast"), run("slow", slow=3.0)
        figures = json.loads((slow / "results.json").read_text())["drafters"]["pld"]
        found = compare(fast, [slow / "answers" / "pld.jsonl"])
        assert found["speedup"] == pytest.approx(figures["end_to_end_speedup"]) == pytest.approx(8.5 / 4.5)
        assert found["speedup_of"] == "own_plain"
        assert found["speedup_interval"] == pytest.approx((8.5 / 4.5, 8.5 / 4.5))
        (details,) = found["others"].values()
        assert details["over_own_plain"] == pytest.approx(8.5 / 4.5)
        assert details["spec_bench"]["speedup"] == pytest.approx(8.5 / 4.5)

    def test_two_drafters_of_two_runs_are_compared_by_their_speedups(self, run):
        one, two = run("one"), run("two", gain=4, slow=5.0)
        found = compare(one / "answers" / "pld.jsonl", [two / "answers" / "pld.jsonl"])
        assert found["speedup"] == pytest.approx((8.5 / 2.5) / (8.5 / 4.5))

    def test_within_one_run_the_clocks_are_compared(self, run):
        found = compare(run("one"), [])
        assert (found["speedup_of"], found["warnings"]) == ("same_run", [])
        assert found["speedup"] == pytest.approx(8.5 / 4.5)

    def test_unlike_settings_are_warned_of_by_name(self, run):
        one = run("one", max_new_tokens=32, dtype="bfloat16")
        two = run("two", max_new_tokens=48, dtype="float32", temperature=0.5, batch_size=3)
        found = compare(one, [two / "answers" / "pld.jsonl"])
        (details,) = found["others"].values()
        assert set(details["unlike"]) == {"max_new_tokens", "dtype", "temperature", "batch_size"}
        assert "different max_new_tokens: 32 in one, 48 in two" in found["warnings"]

    def test_other_hardware_is_warned_of(self, run):
        one, two = run("one"), run("two")
        facts = json.loads((two / "run.json").read_text())
        (two / "run.json").write_text(json.dumps(facts | {"hardware": {"cpu": {"model": "Z80", "cores": 1}}}))
        assert compare(one, [two])["warnings"] == ["different machine: unknown CPU in one, Z80, 1 cores in two"]

    def test_runs_of_different_targets_or_prompts_are_refused(self, run):
        one = run("one", target="org/a")
        with pytest.raises(ValueError, match="different targets: org/a, org/b"):
            compare(one, [run("two", target="org/b")])
        asked = [Question(i, "qa", (f"another question {i}",)) for i in range(9)]
        with pytest.raises(ValueError, match="different prompts: 9 of 9 shared questions"):
            compare(one, [run("three", target="org/a", asked=asked)])
        asked = [Question(f"x{i}", "qa", (f"question {i}",)) for i in range(9)]
        with pytest.raises(ValueError, match="no question in common"):
            compare(one, [run("four", target="org/a", asked=asked)])

    def test_one_path_with_other_weights_is_another_target_and_another_path_with_the_same_is_not(self, run):
        one, two = run("one", target="models/a"), run("two", target="/somewhere/a")

        def weights(folder, fingerprint):
            facts = json.loads((folder / "run.json").read_text())
            target = TargetIdentity("a", "c0", 10, 300, fingerprint).to_json()
            (folder / "run.json").write_text(json.dumps(facts | {"target": target}))

        weights(one, "f0")
        weights(two, "f0")
        assert compare(one, [two])["warnings"] == []
        weights(two, "f1")
        with pytest.raises(ValueError, match="different targets"):
            compare(one, [two])

    def test_files_outside_run_folders_are_compared_by_the_clock_with_a_note(self, run, tmp_path):
        """Spec-Bench's files: no run.json, no plain decoding beside them."""
        paths = []
        for name, seconds in (("vanilla", 2.0), ("eagle", 1.0)):
            paths.append(tmp_path / f"{name}.jsonl")
            paths[-1].write_text("".join(json.dumps(row(i, seconds=(seconds,))) + "\n" for i in range(9)))
        found = compare(paths[0], [paths[1]])
        assert (found["speedup"], found["speedup_of"]) == (2.0, "wall_clock")
        assert any("ratios of wall clocks" in line for line in found["warnings"])
        assert compare(run("one"), [paths[1]])["speedup_of"] == "wall_clock"

    def test_the_tables_fit_80_columns_and_the_warnings_come_first(self, run):
        one, two = run("one", max_new_tokens=32), run("two", max_new_tokens=48, slow=2.0)
        file = io.StringIO()
        show(compare_tables(compare(one, [two / "answers" / "pld.jsonl"])), Console(file=file, width=80))
        lines = file.getvalue().splitlines()
        assert lines[0] == "warning: different max_new_tokens: 32 in one, 48 in two"
        assert [line for line in lines if len(line) > 80 and (" " in line.strip() or "/" not in line)] == []
        assert any(line.split()[1:] == ["9/9", "0", "0", "9"] and "pld.jsonl" in line for line in lines)
        assert any("over its plain" in line for line in lines)
        assert any(line.split() == ["overall", "9", "0.89", "1.89x", "1.89", "[1.89,", "1.89]"] for line in lines)


class TestCommand:
    @pytest.fixture
    def files(self, tmp_path):
        paths = {}
        for name, rows in (("base", [row(1), row(2)]), ("same", [row(2), row(1)]), ("less", [row(1)])):
            paths[name] = tmp_path / f"{name}.jsonl"
            paths[name].write_text("".join(json.dumps(one) + "\n" for one in rows))
        return {name: str(path) for name, path in paths.items()}

    def test_require_equal_sets_the_exit_code(self, files):
        from draftsmith.recipes.commands.compare import compare as command

        assert command(files["base"], [files["same"]], require="equal") == 0
        assert command(files["base"], [files["less"]], require="equal") == 1
        assert command(files["base"], [files["same"], files["less"]], require="equal") == 1
        assert command(files["base"], [files["less"]]) == 0

    def test_json_is_the_last_line(self, files, capsys):
        from draftsmith.recipes.commands.compare import compare as command

        command(files["base"], [files["less"]], json=True)
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (report["equal"], report["total"], report["speedup"]) == (1, 2, 1.0)
        assert "speedup_interval" in report
