"""Acceptance from the /metrics of our own server, vLLM and SGLang: what was counted during a load alone."""

from __future__ import annotations

import pytest

from draftsmith.infer.contract.trace import StepTrace
from draftsmith.infer.measure.served.counters import DraftCounts, ServerCounters
from draftsmith.infer.serving.metrics import ServerMetrics


def vllm(drafts: int, accepted: int, drafted: int, tokens: int = 0, ending: str = "_total") -> str:
    labels = '{engine="0",model_name="m"}'
    made = ""
    for name, value in {
        "spec_decode_num_drafts": drafts, "spec_decode_num_accepted_tokens": accepted,
        "spec_decode_num_draft_tokens": drafted, "generation_tokens": tokens,
        "prefix_cache_queries": 4 * tokens, "prefix_cache_hits": tokens,
    }.items():  # fmt: skip
        made += f"# HELP vllm:{name}{ending} Text.\n# TYPE vllm:{name}{ending} counter\n"
        made += f"vllm:{name}{ending}{labels} {float(value)}\n"
        made += f"# TYPE vllm:{name}_created gauge\nvllm:{name}_created{labels} 1.7e+09\n"
    made += "# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter\n"
    return made + 'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 9.0\n'


def sglang(length: float, rate: float = 0.5) -> str:
    return (
        "# TYPE sglang:spec_accept_length gauge\n"
        f'sglang:spec_accept_length{{model_name="m",tp_rank="0"}} {length}\n'
        "# TYPE sglang:spec_accept_rate gauge\n"
        f'sglang:spec_accept_rate{{model_name="m",tp_rank="0"}} {rate}\n'
        "# TYPE sglang:generation_tokens_total counter\n"
        'sglang:generation_tokens_total{model_name="m"} 40.0\n'
    )


def between(before: str | None, after: str | None) -> DraftCounts:
    return ServerCounters.read(before).until(ServerCounters.read(after))


@pytest.mark.parametrize("ending", ["_total", ""])
def test_vllm_s_counters_before_a_load_do_not_count(ending):
    counts = between(vllm(1000, 10, 3000, 5, ending), vllm(1100, 260, 3500, 355, ending))
    assert counts.drafters() == {"vllm": {"accepted_length": 3.5, "acceptance_rate": 0.5, "steps": 100}}
    assert counts.total("tokens") == 350
    assert counts.cached_share == 0.25


def test_a_vllm_without_drafts_shows_none():
    counts = between(vllm(0, 0, 0, 5), vllm(0, 0, 0, 90))
    assert (counts.kind, counts.drafters()) == ("vllm", {})


def test_sglang_s_gauge_is_taken_as_it_stands_after_the_load():
    counts = between(sglang(9.0), sglang(2.5, 0.3))
    assert counts.drafters() == {"sglang": {"accepted_length": 2.5, "acceptance_rate": 0.3, "steps": None}}
    assert between(sglang(0.0), sglang(0.0)).drafters() == {}


def trace(sources: dict[str, int], committed: list[str]) -> StepTrace:
    return StepTrace(
        row="0", step=0, batch=1, context=3, nodes=sum(sources.values()), trials=0, depth=2,
        accepted=len(committed) - 1, committed=len(committed), nodes_by_source=sources, committed_sources=committed,
    )  # fmt: skip


def test_our_own_server_counts_by_drafter_and_source():
    metrics = ServerMetrics()
    metrics.row_ended("small", [trace({"small": 4}, ["target"])] * 5)
    before = metrics.text().decode()
    metrics.row_ended("small", [trace({"small": 3, "pld": 1}, ["small", "pld", "target"])] * 10)
    metrics.row_ended("small", [trace({"small": 4}, ["target"])] * 10)
    metrics.new_tokens(40)
    counts = between(before, metrics.text().decode())
    assert counts.drafters() == {"small": {"accepted_length": 2.0, "acceptance_rate": 0.25, "steps": 20}}
    assert counts.total("tokens") == 40


def test_loads_add_up_and_the_steps_are_weighed():
    first, second = between(vllm(0, 0, 0), vllm(10, 0, 40)), between(vllm(10, 0, 40), vllm(40, 90, 160))
    assert (DraftCounts() + first + second).drafters()["vllm"]["accepted_length"] == 1 + 90 / 40


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (None, None, "it has no /metrics"),
        (vllm(9, 9, 9), vllm(1, 1, 1), "went down"),
        ("python_info 1.0\n", "python_info 1.0\n", "not those of Draftsmith, vLLM or SGLang"),
        ("<html>{{{</html>", "x", "cannot be read"),
        (vllm(1, 1, 1), None, "it has no /metrics"),
    ],
)
def test_what_cannot_be_known_is_said_and_not_guessed(before, after, problem):
    counts = between(before, after)
    assert problem in counts.problem
    assert (counts.drafters(), counts.cached_share) == ({}, None)
