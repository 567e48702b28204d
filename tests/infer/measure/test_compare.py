"""Answer files against a base: the traps of Spec-Bench's two reports, and its formulas by hand."""

import json
import random

import pytest

from draftsmith.infer.measure.compare import compare


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
        low, high = report["speedup_interval"]
        assert low <= report["speedup"] <= high

    def test_mt_bench_is_one_task_and_the_others_their_own(self, against):
        """MT-Bench: rates 10, 30 against 20, 60, exactly twice as fast; translation: half as fast."""
        _, details = against(self.BASE, self.OTHER)
        tasks = details["by_category"]
        assert list(tasks) == ["mt_bench", "translation"]
        assert tasks["mt_bench"]["spec_bench"]["speedup"] == pytest.approx(2)
        assert tasks["mt_bench"]["speedup"] == pytest.approx(2)
        assert tasks["mt_bench"]["speedup_interval"] == pytest.approx((2, 2))
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
