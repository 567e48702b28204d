"""The report as files: what stands in them, that nothing leaves them, and that every text is text."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from draftsmith.infer.measure.report.report import write_report
from draftsmith.infer.measure.runners import Question

EVIL = "<script>alert('x')</script><img src=http://evil/x.png onerror=alert(1)>"
REGISTRY = {"pld": {"class_path": "x", "elsewhere": {"vLLM": "vllm serve {target}"}}, "oracle": {"control": True}}
RUNNERS = {"pld": {"per_step": 2}, "small": {"per_step": 4, "step_s": 1.5}, "oracle": {"per_step": 8}}


class Page(HTMLParser):
    """Elements and text of a page; void elements aside, everything that is opened has to be closed."""

    VOID = ("meta", "link", "br", "img", "line", "rect", "path", "polyline")

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_the_page_tells_the_verdict_and_the_figures_of_the_results(run_folder):
    folder = run_folder("run", RUNNERS, target="org/model", max_new_tokens=8)
    made = write_report([folder], None, REGISTRY)
    assert made.page == folder / "report.html"
    page = Page(made.page.read_text())
    figures = json.loads((folder / "results.json").read_text())["drafters"]
    (verdict,) = made.verdicts
    assert verdict == "Use small: 2.67x [2.67, 2.67] plain decoding at batch 1."
    assert verdict in page.text
    assert figures["small"]["speedup"] == pytest.approx(8 / 3)
    for name, row in figures.items():
        assert name in page.text
        assert f"{row['speedup']:.2f}" in page.text, name
        assert f"{row['accepted_length']:.2f}" in page.text, name
    assert "27 of 27 answers of the drafters and controls equal plain decoding's" in page.text
    assert "draftsmith generate --target org/model --drafters small" in page.text
    assert "drafts that are always right reach 8.00" in page.text
    assert sum(tag == "svg" and "wide" in attrs.get("class", "") for tag, attrs in page.elements) >= 3
    assert "Best: 4.00 tokens a step, 2.67x question 0, writing question 0" in page.text


def test_nothing_is_loaded_and_nothing_runs(run_folder):
    made = write_report([run_folder("run", RUNNERS)], None, REGISTRY)
    html = made.page.read_text()
    page = Page(html)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "base", "form"}
    for tag, attrs in page.elements:
        assert not any(name.startswith("on") for name in attrs), tag
        assert all(attrs.get(name, "data:,").startswith("data:") for name in ("src", "href")), tag
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_every_text_that_a_person_or_a_model_wrote_is_escaped(run_folder, clock):
    asked = [Question(f"{at}{EVIL}", EVIL, (f"{at} {EVIL}",)) for at in range(4)]
    runners = {EVIL: {"per_step": 2, "answer": lambda prompt: [ord(letter) for letter in EVIL]}}

    def change(results):
        difference = {"question_id": EVIL, "repeat": 0, "turn": 0, "index": 1, "base": 1, "other": None}
        results["drafters"][EVIL]["differences"] = [difference | {"tie": False, "gap": 1.0, "error": 0.1}]
        results["drafters"][EVIL]["error_list"] = [{"question_id": "other", "error": EVIL}]

    folder = run_folder("run", runners, asked=asked, change=change, drafters="pld", target=EVIL)
    made = write_report([folder], None, REGISTRY)
    html = made.page.read_text()
    assert EVIL not in html
    assert "<script" not in html.lower()
    assert "<img" not in html.lower()
    assert Page(html).text.count("alert('x')") > 10
    outside = re.sub(r"(?s)^```sh\n.*?^```$", "", made.markdown.read_text(), flags=re.MULTILINE)
    assert "<script" not in outside.lower()
    assert "&lt;script&gt;" in outside


def test_a_wrong_answer_is_an_alarm_and_bars_the_drafter(run_folder):
    def change(results):
        difference = {"question_id": 2, "repeat": 0, "turn": 0, "index": 1, "base": 5, "other": 6}
        results["drafters"]["small"]["differences"] = [difference | {"tie": False, "gap": 3.0, "error": 0.01}]
        results["drafters"]["small"]["equal"] = 8

    made = write_report([run_folder("run", RUNNERS, change=change)], None, REGISTRY)
    assert made.verdicts[0].startswith("Use pld")
    text = Page(made.page.read_text()).text
    assert "small must not be used: 1 of its answers differ" in text
    assert "A BUG" in text
    assert "question 2, turn 1, token 1: 5 in plain, 6 here: not a tie, a bug" in text


def test_ties_are_named_and_bar_nobody(run_folder):
    def change(results):
        difference = {"question_id": 2, "repeat": 0, "turn": 0, "index": 1, "base": 5, "other": 6}
        results["drafters"]["small"]["differences"] = [difference | {"tie": True, "gap": 0.01, "error": 0.03}]
        results["drafters"]["small"] |= {"equal": 8, "ties": 1}

    made = write_report([run_folder("run", RUNNERS, change=change)], None, REGISTRY)
    assert made.verdicts[0].startswith("Use small")
    text = Page(made.page.read_text()).text
    assert "1 differ after a numeric tie of two logits, none otherwise" in text
    assert "numeric tie (float32 logits 0.01 apart, rounding error there 0.03)" in text


def test_answers_of_drawn_drafts_are_said_to_have_the_distribution_only(run_folder):
    runners = {"small": {"per_step": 4, "answer": lambda prompt: [9] * 8, "drawn": True}, "pld": {"per_step": 2}}
    made = write_report([run_folder("run", runners, temperature=0.8)], None, REGISTRY)
    assert made.verdicts[0].startswith("Use small")
    text = Page(made.page.read_text()).text
    assert "9 of 9 answers of the drafters and controls equal plain decoding's, token by token." in text
    assert "9 answers come from drawn drafts: they have plain decoding's distribution, not its tokens" in text
    assert "plain's distribution, not its tokens" in text
    assert "small: 9 differ" not in text
    assert "0 of 9" not in text
    row = next(line for line in made.markdown.read_text().splitlines() if line.startswith("| small"))
    assert "| drawn |" in row


def outlook(speedup):
    """A forecast file with one rule at two batch sizes."""
    cell = {"drafter": "small", "draft": "4", "accepted_length": 2.5, "accepted_length_interval": [2.4, 2.6],
            "tokens_per_s": 250.0, "speedup": speedup, "speedup_interval": [speedup - 0.1, speedup + 0.1]}  # fmt: skip
    batches = [{"batch_size": n, "plain_tokens_per_s": 100.0 * n, "rules": {"block": cell}} for n in (1, 32)]
    sampling = {"temperature": 0.8, "top_k": 0, "top_p": 1.0}
    return json.dumps({"kind": "forecast", "texts": 9, "tokens": 90, "sampling": sampling, "costs": "m <b>on</b> a CPU",
                       "modelled": "", "by_batch_size": batches})  # fmt: skip


def test_a_forecast_is_shown_from_the_run_folder_and_from_a_file(run_folder, tmp_path):
    folder = run_folder("run", RUNNERS)
    bare = write_report([folder], None, REGISTRY)
    assert "What would pay" not in bare.page.read_text() + bare.markdown.read_text()
    (folder / "forecast.json").write_text(outlook(1.77))
    (tmp_path / "other.json").write_text(outlook(1.33))
    made = write_report([folder], None, REGISTRY, [tmp_path / "other.json"])
    html = made.page.read_text()
    text = Page(html).text
    assert text.count("What would pay at which batch size") == 2
    assert "Forecast from 9 answers, 90 tokens, drawn at temperature 0.8; costs: m <b>on</b> a CPU" in text
    assert "<b>on</b>" not in html
    assert html.count("<title>Predicted speedup by batch size</title>") == 2
    for shown in ("1.77 [1.67, 1.87]", "1.33 [1.23, 1.43]", "2.50 [2.40, 2.60]", "small 4", "3200.0"):
        assert shown in text
    row = next(line for line in made.markdown.read_text().splitlines() if line.startswith("| 32 | 3200.0"))
    assert row == "| 32 | 3200.0 | block | small 4 | 2.50 [2.40, 2.60] | 250.0 | 1.77 [1.67, 1.87] |"
    (folder / "forecast.json").write_text("{}")
    with pytest.raises(ValueError, match=r"forecast.json is no forecast"):
        write_report([folder], None, REGISTRY)


def test_where_none_pays_the_page_says_so_and_what_to_do(run_folder):
    made = write_report([run_folder("run", {"pld": {"step_s": 2.0}}, target="org/model")], None, REGISTRY)
    assert made.verdicts == ["No drafter pays: plain decoding wins. The nearest is pld, 0.50x [0.50, 0.50] at batch 1."]
    assert "draftsmith plan --target org/model" in Page(made.page.read_text()).text


def test_several_runs_are_batch_sizes_and_temperatures_of_one_page(run_folder, tmp_path):
    one = run_folder("one", {"pld": {"per_step": 2}}, drafters="pld[matches=2]")
    three = run_folder("three", {"pld": {"per_step": 2, "step_s": 3.0}}, batch_size=3, drafters="pld[matches=2]")
    warm = run_folder("warm", {"pld": {"per_step": 4}}, temperature=0.8, drafters="pld[matches=2]")
    made = write_report([three, warm, one], tmp_path / "new" / "all.html", REGISTRY)
    assert made.page == tmp_path / "new" / "all.html"
    assert made.verdicts == [
        "At temperature 0 use pld[matches=2]: 2.00x [2.00, 2.00] plain decoding at batch 1; "
        "off above batch 1 (0.67x at batch 3).",
        "At temperature 0.8 use pld[matches=2]: 4.00x [4.00, 4.00] plain decoding at batch 1.",
    ]
    text = Page(made.page.read_text()).text
    for label in ("batch 1, temperature 0", "batch 3, temperature 0", "batch 1, temperature 0.8"):
        assert f"In detail: {label}" in text


def test_left_out_prompts_and_figures_over_all_are_told(run_folder):
    def change(results):
        results["left_out"] |= {"min_distinct": 0.5, "questions": 2, "ids": [0, 3]}
        for figures in results["drafters"].values():
            figures["all_questions"] = {**figures, "speedup": 9.87, "speedup_interval": [9.0, 10.0]}

    made = write_report([run_folder("run", RUNNERS, change=change)], None, REGISTRY)
    text = Page(made.page.read_text()).text
    assert "2 of 9 prompts are left out of the figures" in text
    assert "all 9.87x" in text
    assert not re.search(r"question [03],", text.split("Best and worst")[1])
    assert "9.87 [9.00, 10.00]" in made.markdown.read_text()


def test_loops_that_were_left_in_are_told(run_folder):
    loop = {"answer": lambda prompt: [7] * 20}
    folder = run_folder("run", {"pld": {"per_step": 2} | loop}, change=None)
    rows = [json.loads(line) for line in (folder / "answers" / "plain.jsonl").read_text().splitlines()]
    for row in rows[:2]:
        row["choices"][0]["token_ids"] = [[7] * 20]
    (folder / "answers" / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = write_report([folder], None, REGISTRY)
    text = Page(made.page.read_text()).text
    assert "loops on 2 of 9 prompts" in text
    assert text.index("loops on 2 of 9") < text.index("Lossless"), "the warning belongs beside the verdict"
    assert text.count("loops on 2 of 9") == 1
    assert any("loops on 2 of 9 prompts" in note for note in made.notes)


@pytest.mark.parametrize("count", [2, 7])
def test_below_eight_questions_nothing_is_recommended_and_no_interval_is_shown(run_folder, count):
    """Runs of older versions have intervals from two questions on."""

    def change(results):
        for row in results["drafters"].values():
            row["speedup_interval"] = row["accepted_length_interval"] = [2.78, 2.78]

    asked = [Question(i, "qa", (f"question {i}",)) for i in range(count)]
    made = write_report([run_folder("run", RUNNERS, asked=asked, change=change)], None, REGISTRY)
    assert made.verdicts == [
        "It is not known which drafter pays: fewer than 8 questions give no interval. The fastest was small, 2.67x "
        "plain decoding at batch 1."
    ]
    for path in (made.page, made.markdown, *made.pictures):
        assert "2.78" not in path.read_text(), path
    assert "draftsmith generate" not in made.markdown.read_text()


def test_the_first_table_has_tokens_per_second_and_answer_latency(run_folder):
    """pld: 4 steps of 1 s and a prefill of 0.5 s for 8 tokens; a batch of three is answered at once."""
    made = write_report([run_folder("run", RUNNERS), run_folder("three", RUNNERS, batch_size=3)], None, REGISTRY)
    first = Page(made.page.read_text()).text.split("In detail")[0]
    assert "tokens/s" in first
    assert "answer latency" in first
    rows = [line.split(" | ") for line in made.markdown.read_text().splitlines() if line.startswith("| pld")]
    assert [(row[2], row[3]) for row in rows] == [("2.0", "4.50"), ("6.0", "4.50")]
    assert ">4.50</td>" in made.page.read_text()


def test_engines_that_were_not_run_are_marked(run_folder):
    runners = {"pld": {"per_step": 4}, "transformers": {"traced": False}}
    made = write_report([run_folder("run", runners, drafters="pld", target="org/model")], None, REGISTRY)
    text = Page(made.page.read_text()).text
    assert "not measured: vLLM" in text
    assert "or vLLM (not measured) vllm serve org/model" in text
    assert "here, vLLM (not measured)" in made.markdown.read_text()
    assert "transformers (not measured)" not in text, "the peer was measured"


def test_plain_decoding_alone_and_a_failing_drafter_make_a_page_too(run_folder):
    alone = write_report([run_folder("alone", {})], None, REGISTRY)
    assert alone.verdicts[0].startswith("Nothing to choose from")
    failing = {"pld": {"fails_on": lambda prompt: True}}
    made = write_report([run_folder("failing", failing)], None, REGISTRY)
    assert made.verdicts[0].startswith("Nothing to choose from")
    assert "9 failed" in Page(made.page.read_text()).text


def test_markdown_and_pictures_lie_beside_the_page(run_folder):
    made = write_report([run_folder("run", RUNNERS)], None, REGISTRY)
    assert sorted(path.name for path in made.pictures) == ["report-length.svg", "report-speedup.svg"]
    for path in made.pictures:
        picture = ET.fromstring(path.read_text())
        assert picture.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in path.read_text()
        assert list(picture.iter("{http://www.w3.org/2000/svg}path"))
    text = made.markdown.read_text()
    assert made.verdicts[0] in text
    assert all(f"({path.name})" in text for path in made.pictures)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 4
    assert len({row.count("|") for row in rows}) == 1
    assert not list(made.page.parent.glob(".*.part"))


def test_exits_and_sources_are_drawn_where_a_drafter_has_them(run_folder):
    def change(results):
        counts = {"reached": 40, "accepted": 20, "share": 0.5}
        results["drafters"]["small"] |= {
            "by_exit": {"6": 30, "12": 10},
            "by_source": {"rest": {"nodes": 80, **counts, "acceptance_rate": 0.25}},
            "by_depth": [{"depth": 1, **counts, "by_source": {"rest": counts}}],
        }

    made = write_report([run_folder("run", RUNNERS, change=change)], None, REGISTRY)
    text = Page(made.page.read_text()).text
    assert "Exits used by small" in text
    assert "30 (75%)" in text
    assert "Acceptance by depth" in text
    assert "small : rest" in text
    assert [path.name for path in made.pictures] == ["report-speedup.svg", "report-length.svg", "report-depth.svg"]


@pytest.mark.parametrize("out", ["folder", "report.pdf"])
def test_a_page_needs_a_name_that_ends_in_html(run_folder, tmp_path, out):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"ends in \.html"):
        write_report([run_folder("run", RUNNERS)], tmp_path / out, REGISTRY)
