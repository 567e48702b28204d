"""Logs as they come: which log-probabilities a forecast may use, and which it refuses."""

from __future__ import annotations

import pytest
from tiny_folders import tiny_llama

from draftsmith.infer.contract.sampling import Settings, resolve_settings
from draftsmith.infer.measure.forecast.texts import greedy_texts, logged_settings, logged_texts, scored_texts
from draftsmith.infer.measure.recordings import Recording
from draftsmith.infer.models.hf_target import HFTarget


def log(key="a", logprobs=(-1.0, -2.0), mode="", **sampling) -> Recording:
    return Recording(key, "", [1], [5, 6], logprobs=list(logprobs), logprobs_mode=mode, sampling=sampling)


def test_processed_ones_are_taken_at_any_temperature():
    found = logged_texts([log(mode="processed_logprobs")], Settings(0.8, top_p=0.9))
    assert found[0].target_logprobs_T.tolist() == [-1.0, -2.0]
    assert logged_texts([log()], Settings(0.8), "processed")[0].key == "a"


def test_raw_ones_are_taken_at_temperature_1_only():
    assert logged_texts([log(mode="raw_logprobs")], Settings(1.0, seed=3))[0].key == "a"
    for settings in (Settings(0.8), Settings(1.0, top_p=0.9)):
        for mode, said in (("raw_logprobs", "are raw"), ("", "may be raw")):
            with pytest.raises(ValueError, match=f"a {said}.*forecast --target"):
                logged_texts([log(mode=mode)], settings)
    with pytest.raises(ValueError, match="are raw"):
        logged_texts([log()], Settings(0.8), "raw")


@pytest.mark.parametrize(
    ("logprobs", "problem"),
    [((), "no log-probabilities"), ((-1.0,), "1 log-probabilities for 2 tokens"), ((-1.0, 0.5), "above 0: 0.5"),
     ((-1.0, -9999.0), "token 1 has probability 0")],
)  # fmt: skip
def test_logs_that_cannot_be_used_are_named(logprobs, problem):
    with pytest.raises(ValueError, match=f"^the log-probabilities of a.*|^a .*{problem}"):
        logged_texts([log(logprobs=logprobs)], Settings(1.0))


def test_settings_come_from_the_logs_and_fill_in_what_they_leave_open():
    logs = [log(temperature=0.8, top_k=-1, top_p=1.0, bad_words_ids=[], presence_penalty=0.0)] * 2
    assert resolve_settings(None, **logged_settings(logs, {})) == Settings(0.8)
    assert logged_settings(logs, {"temperature": 0.8}) == {"temperature": 0.8}
    assert logged_settings([log()], {"temperature": 0.5, "top_k": 5}) == {"temperature": 0.5, "top_k": 5}
    assert logged_settings([log(temperature=1.0, top_p=0.5)], {}) == {"temperature": 1.0, "top_p": 0.5}
    assert logged_settings([log(top_p=0.5)], {"temperature": 0.8}) == {"temperature": 0.8, "top_p": 0.5}
    for logs in ([log(), log("b", temperature=0.8)], [log("b", temperature=0.8), log()]):
        assert logged_settings(logs, {"temperature": 0.8}) == {"temperature": 0.8}


@pytest.mark.parametrize(
    ("logs", "asked", "problem"),
    [([log(temperature=0.8), log("b", temperature=0.7)], {}, "a and b were drawn with different settings"),
     ([log(temperature=0.8)], {"temperature": 1.0}, "--temperature 1.0 was given"),
     ([log(temperature=0.8)], {"top_k": 5}, "--top_k 5 was given"),
     ([log()], {}, "a does not say at what temperature.*give --temperature"),
     ([log(temperature=0.8), log("b")], {}, "b does not say at what temperature"),
     ([log(), log("b", temperature=0.8)], {"temperature": 0.0}, "--temperature 0.0 was given"),
     ([log(top_p=0.5)], {}, "a does not say at what temperature"),
     ([log(temperature=0.8, presence_penalty=0.5)], {}, "presence_penalty")],
)  # fmt: skip
def test_settings_that_contradict_are_refused(logs, asked, problem):
    with pytest.raises(ValueError, match=problem):
        logged_settings(logs, asked)


def test_greedy_texts_need_no_log_probabilities():
    (found,) = greedy_texts([log(logprobs=(), temperature=0.0)])
    assert (found.key, found.answer, found.target_logprobs_T.tolist()) == ("a", [5, 6], [0.0, 0.0])
    assert resolve_settings(None, **logged_settings([log(temperature=0.0)], {})).greedy


def test_a_target_that_could_not_have_drawn_a_text_is_noticed():
    with pytest.raises(ValueError, match="a was not drawn with these settings"):
        scored_texts(HFTarget(tiny_llama()), [log()], Settings(1.0, top_k=1))
