"""Replay: a recorded answer is a target, and what drafters would have drafted of it can be counted by hand."""

from __future__ import annotations

import pytest
from tiny_folders import tiny_llama

from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.drafters import Mixed, SmallLM
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.measure.recordings import Recording
from draftsmith.infer.measure.replay import Replay
from draftsmith.infer.measure.tables import replay_tables
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.retrieval import PromptLookup

VOCAB = 40
# After the first token (2), the text repeats the prompt: 3 4 5 6 are drafted from it in one step with 4 nodes, and 7
# comes from the target. From 7 on nothing was met before.
PROMPT = [1, 2, 3, 4, 5, 6, 9]
ANSWER = [2, 3, 4, 5, 6, 7, 8, 10]
SINGLE = PromptLookup(num_draft_tokens=4, max_ngram=2, matches=1)


def figures(drafter, *streams, **options):
    return Replay(streams, VOCAB, **options).results({"it": drafter})["drafters"]["it"]


def test_the_figures_of_a_small_recording_are_those_counted_by_hand():
    """Steps: [2] nothing known after 9; [3 4 5 6 | 7] drafted 3 4 5 6; [8]; [10]: 8 tokens in 4 steps."""
    found = figures(SINGLE, Recording("a", "qa", PROMPT, ANSWER))
    assert found["steps"] == 4
    assert found["accepted_length"] == 8 / 4
    assert found["hit_rate"] == 1 / 4
    assert found["nodes_per_step"] == 4 / 4
    assert found["acceptance_rate"] == 1.0
    assert [(row["depth"], row["reached"], row["accepted"]) for row in found["by_depth"]] == [
        (1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1)
    ]  # fmt: skip


def test_a_draft_that_goes_wrong_is_counted_to_where_it_did():
    """After 2 the prompt says 3 4 5 6 and the answer 3 4 11: [2], [3 4 | 11], [1], then 2 3 4 is proposed for 1."""
    found = figures(SINGLE, Recording("a", "qa", PROMPT, [2, 3, 4, 11, 1, 12]))
    assert found["steps"] == 4  # the last token is alone: with nothing left below it, nothing is drafted
    assert found["accepted_length"] == 6 / 4
    assert (found["acceptance_rate"], found["nodes_per_step"]) == (2 / 4, 4 / 4)


def test_the_budget_bounds_nodes_and_depth():
    stream = Recording("a", "qa", PROMPT, ANSWER)
    assert figures(SINGLE, stream, budget=Budget(64, 2))["steps"] == 5  # [2] [3 4 5] [6 7] [8] [10]
    assert figures(SINGLE, stream, budget=Budget(0, 0))["accepted_length"] == 1.0


def test_a_drafter_s_figures_are_those_of_decoding_where_the_recording_is_greedy(shake):
    model = tiny_llama()
    prompts = [[5, 6, 7, 8, 9], [20, 21, 20, 21, 20], list(range(30, 60))]

    def rows():
        return [Row(str(i), list(prompt), Settings(), Stops(40)) for i, prompt in enumerate(prompts)]

    target, empty = HFTarget(model), Empty()
    empty.bind(target)
    recorded = generate(target, empty, rows())
    streams = [Recording(g.row, "", prompts[int(g.row)], g.token_ids) for g in recorded]
    for drafter in (SmallLM(shake(model, 0.06)), SmallLM(shake(model, 0.1), top_k=3, nodes=12), PromptLookup()):
        drafter.bind(target)
        done = generate(target, drafter, rows())
        assert [g.token_ids for g in done] == [g.token_ids for g in recorded]
        steps = sum(len(g.traces) for g in done)
        found = Replay(streams, target.vocab_size).results({"it": drafter})["drafters"]["it"]
        assert found["accepted_length"] == sum(len(g.token_ids) for g in done) / steps > 1.3
        assert found["nodes_per_step"] == sum(trace.nodes for g in done for trace in g.traces) / steps


def test_sampled_drafts_are_taken_at_temperature_0_only():
    drafter = SmallLM(tiny_llama(VOCAB))
    stream = Recording("a", "qa", PROMPT, ANSWER)
    assert figures(drafter, stream)["steps"] <= len(ANSWER)
    with pytest.raises(ValueError, match="outright drafts only"):
        figures(drafter, stream, temperature=0.7)
    outright = figures(SINGLE, stream, temperature=0.7)
    assert outright["accepted_length"] == 2.0


def test_a_token_id_that_the_tokenizer_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"a holds token id 40, but the tokenizer ends at 40"):
        figures(SINGLE, Recording("a", "qa", PROMPT, [1, 40]))


class Parrot(Empty):
    """Drafts what follows the newest token in the documents that it was given, and tells which it has."""

    name = "parrot"

    def __init__(self, *documents):
        self.documents = list(documents)

    def propose(self, rows, budgets, policy=None):
        drafts = [Draft() for _ in rows]
        for row, budget, draft in zip(rows, budgets, drafts):
            found = [d[d.index(row.ids[-1]) + 1 :] for d in self.documents if row.ids[-1] in d]
            parent = -1
            for token in found[-1][: budget.depth] if found else ():
                parent = draft.outright(parent, token, self.name)
        return drafts

    def holds(self, ids):
        return any(d[i : i + len(ids)] == ids for d in self.documents for i in range(len(d)))

    def add_document(self, ids):
        self.documents.append(list(ids))


STREAMS = [
    Recording(key, "", [30], answer) for key, answer in [("a", [2, 3, 4]), ("b", [5, 6, 7, 8]), ("c", [2, 3, 4])]
]


def test_leaked_answers_are_counted_and_the_figures_are_given_without_them():
    """a and c are held: [2] [3 4], two steps each; of b nothing is known: four steps."""
    found = figures(Parrot([1, 2, 3, 4, 9]), *STREAMS)
    assert found["accepted_length"] == 10 / 8
    leaked = found["leakage"]
    assert (leaked["answers"], leaked["share"], leaked["token_share"]) == (2, 2 / 3, 6 / 10)
    assert (leaked["without"]["accepted_length"], leaked["without"]["total"]) == (1.0, 1)
    assert figures(Parrot([2, 3, 4], [5, 6, 7, 8]), *STREAMS)["leakage"]["without"] is None
    assert figures(Parrot([9]), *STREAMS)["leakage"]["answers"] == 0
    assert figures(SINGLE, *STREAMS)["leakage"] is None


def test_leaked_prompts_are_counted_and_left_out_as_well():
    """a leaks by its answer, b by its prompt, which the store holds without the answer: d alone is left."""
    streams = [*STREAMS[:1], Recording("b", "", [33, 34], [5, 6, 7, 8]), Recording("d", "", [32], [9, 10])]
    leaked = figures(Parrot([2, 3, 4], [33, 34]), *streams)["leakage"]
    assert (leaked["answers"], leaked["prompts"], leaked["left_out"]) == (1, 1, 2)
    assert leaked["prompt_token_share"] == 2 / 4
    assert (leaked["without"]["accepted_length"], leaked["without"]["total"]) == (1.0, 1)


def test_a_prompt_is_found_by_the_user_s_message_whatever_template_it_is_served_in():
    message = list(range(10, 22))
    stream = Recording("a", "", [1, 2, *message, 3], [30, 31], question=message)
    assert figures(Parrot([9, *message[1:], 8]), stream)["leakage"]["prompts"] == 1
    assert figures(Parrot(message[:6]), stream)["leakage"]["prompts"] == 0


def test_the_token_that_ends_an_answer_is_left_out_of_the_comparison(folders):
    end = folders.tokenizer.all_special_ids[0]
    streams = [Recording("a", "", [30], [2, 3, 4, end])]
    size = len(folders.tokenizer)
    found = Replay(streams, size, folders.tokenizer).results({"it": Parrot([2, 3, 4])})["drafters"]["it"]
    assert found["leakage"]["answers"] == 1


def test_answers_that_arrive_are_drafted_from_by_those_that_come_later_alone():
    """a and b are new when they come, and c, the second a, is known: held then, and drafted."""
    found = figures(Parrot(), *STREAMS, arrival=True)
    assert found["accepted_length"] == 10 / (3 + 4 + 2)
    assert found["leakage"]["answers"] == 1
    assert found["leakage"]["without"]["accepted_length"] == 1.0
    assert figures(Parrot(), *STREAMS)["accepted_length"] == 1.0
    with pytest.raises(ValueError, match="none of it can take in answers"):
        figures(SINGLE, *STREAMS, arrival=True)


class Listener(Parrot):
    """Hears of answers with their prompts."""

    name = "listener"
    learns = True

    def __init__(self):
        super().__init__()
        self.heard = []

    def add_answer(self, row):
        self.heard.append(list(row.new_ids))

    def add_document(self, ids):
        raise AssertionError("it takes in answers")


def test_every_part_of_a_mix_hears_of_the_answers_that_arrive():
    parrot, listener = Parrot(), Listener()
    found = figures(Mixed([parrot, listener]), *STREAMS, arrival=True)
    assert parrot.documents == listener.heard == [list(stream.answer) for stream in STREAMS]
    assert found["accepted_length"] == 10 / (3 + 4 + 2)


def test_a_mix_of_coupled_drafts_is_referred_to_likeliest_tokens_of_its_parts():
    model = tiny_llama(VOCAB)
    stream = Recording("a", "qa", PROMPT, ANSWER)
    problem = r"it: coupled .*each draft model in the mix.*mix=pld\+small:MODEL\[sample=likeliest\]$"
    with pytest.raises(ValueError, match=problem):
        figures(Mixed([PromptLookup(), SmallLM(model)]), stream, temperature=0.7)
    mixed = Mixed([PromptLookup(), SmallLM(model, sample="likeliest")])
    assert figures(mixed, stream, temperature=0.7)["nodes_per_step"] > 1


def test_costs_turn_accepted_length_into_speedup_and_break_even():
    """4 steps, one of them with 4 nodes, 8 tokens; a pass of 1 token takes 1 s, of 5 tokens 2 s, of more 2 s as well
    up to 8 and then a second a token: alone a mean step takes 1.25 s, and among 16 rows each node costs a second."""
    costs = Costs({"target": PassCost([1, 5, 8, 100], [1.0, 2.0, 2.0, 94.0])}, overhead=0.0)
    streams = [Recording("a", "qa", PROMPT, ANSWER)]
    found = figures(SINGLE, *streams, costs=costs, batch_sizes=(1, 16))["predicted"]
    alone, many = found["by_batch_size"]
    assert alone["break_even"] == pytest.approx(1.25, abs=0.01)
    assert alone["speedup"] == pytest.approx(2.0 / 1.25, abs=0.02)
    # 16 rows: plain 10 s; with drafts 32 tokens in the mean, 26 s.
    assert many["break_even"] == pytest.approx(26 / 10, abs=0.01)
    assert (alone["pays"], many["pays"]) == (True, False)
    assert 1 <= found["off_above"] < 16
    assert found["measured_up_to"] == 50  # a mean draft has one node
    assert figures(SINGLE, *streams)["predicted"] is None


def test_the_tables_fit_80_columns():
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    costs = Costs({"target": PassCost([1, 5, 100], [1.0, 2.0, 94.0])}, overhead=0.0)
    run = Replay([Recording("a", "qa", PROMPT, ANSWER)], VOCAB, costs=costs, batch_sizes=(1, 4, 8, 16, 32))
    results = run.results({"pld": SINGLE, "a name of twenty char": SINGLE}) | {"split": None}
    console = Console(width=240)
    shown = [one for one in replay_tables(results) if isinstance(one, Table)]
    assert len(shown) == 4
    assert max(Measurement.get(console, console.options, one).maximum for one in shown) <= 80
