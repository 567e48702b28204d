"""Losslessness at every architecture: token-identical to plain decoding in float64, greedy and sampled.

Every test asserts that its own run accepted deep, rejected, and varied: a run that did none of these shows nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoded import assert_tried_hard, decode, tokens
from tiny_models import shaken, tiny_model

from draftsmith.infer.contract.protocols import Drafter
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.calibration import Calibration
from draftsmith.infer.costs.calibrator import Calibrator
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.drafters import SD2, Lookahead, Mixed, Recycling, SmallLM
from draftsmith.infer.drafters.controls import Empty, adversary, oracle
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.runner.model_runner import ModelRunner
from draftsmith.infer.text.rendering import Rendered
from draftsmith.retrieval import Dresd, PromptLookup, Rest
from draftsmith.retrieval.dresd import build as dresd_build
from draftsmith.retrieval.rest.build import make_parts
from draftsmith.retrieval.store.documents import Document
from draftsmith.retrieval.store.segments import Manifest
from draftsmith.retrieval.store.writer import build

ARCHITECTURES = [
    "gemma2", "gemma3", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "opt", "phi3", "qwen2", "qwen3"
]  # fmt: skip
ROWS = 8
SAMPLED = Settings(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=11)
EITHER = {"greedy": Settings(), "sampled": SAMPLED}
PENALISED = Settings(repetition_penalty=1.3, no_repeat_ngram_size=4, min_new_tokens=4)


def make_rows(settings: Settings, new_tokens: int = 40, vocab: int = 61) -> list[Row]:
    """Prompts of uneven length, half of each repeated; rows end at different times, so they join and leave."""
    generator = torch.Generator().manual_seed(7)
    rows = []
    for i in range(ROWS):
        length = int(torch.randint(3, 40, (1,), generator=generator))
        ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
        rows.append(Row(str(i), ids + ids[: length // 2], settings, Stops(new_tokens - 3 * i)))
    return rows


DRAFTERS: dict[str, Callable[[Any], Drafter]] = {
    "chain": lambda model: SmallLM(model, num_draft_tokens=5, top_k=1, min_confidence=0.0, sample=False),
    "tree": lambda model: SmallLM(
        model, num_draft_tokens=5, top_k=3, nodes=12, width=3, min_confidence=0.0, sample=False
    ),
    "unsure chain": lambda model: SmallLM(model, num_draft_tokens=8, top_k=1, min_confidence=0.02, sample=False),
    "sd2": lambda model: SD2(
        model,
        [1, 2],
        "threshold",
        thresholds=[0.5, 0],
        num_draft_tokens=5,
        top_k=3,
        nodes=12,
        min_confidence=0.0,
        sample=False,
    ),
    "sd2 by cost": lambda model: SD2(
        model, [1, 2], num_draft_tokens=6, nodes=16, costs=COSTS, calibration=CALIBRATION, sample=False
    ),
    "int8 tree": lambda model: SmallLM(
        model, num_draft_tokens=5, top_k=3, nodes=12, min_confidence=0.0, sample=False, int8=True
    ),
    "pld": lambda model: PromptLookup(),
    "recycle": lambda model: Recycling(nodes=12),
    "recycle by cost": lambda model: Recycling(max_key=3, costs=CHEAP),
    "lookahead": lambda model: Lookahead(window=4, ngram=3, guesses=3),
    "mixed": lambda model: Mixed(
        [
            PromptLookup(),
            SmallLM(model, num_draft_tokens=4, top_k=2, nodes=8, min_confidence=0.0, sample=False),
            SD2(model, [1, 2], "threshold", thresholds=[0.5, 0], num_draft_tokens=3, top_k=3, min_confidence=0.0),
        ],
        nodes=16,
    ),
    "mixed unread": lambda model: Mixed([PromptLookup(), Recycling(nodes=8)], nodes=12),
    "mixed by cost": lambda model: Mixed(
        [
            PromptLookup(),
            SD2(model, [1, 2], num_draft_tokens=6, nodes=16, costs=CHEAP_TO_VERIFY, calibration=CALIBRATION),
        ]
    ),
}
# For rows with a temperature these share the noise of the target's draws, and so come deep.
COUPLED: dict[str, Callable[[Any], Drafter]] = {
    "coupled": lambda model: SmallLM(model, top_k=3, nodes=12, min_confidence=0.0, sample="coupled"),
    "coupled by cost": lambda model: SmallLM(model, costs=SMALL_COSTS, calibration=WARM_CALIBRATION, sample="coupled"),
    "coupled sd2": lambda model: SD2(
        model, [1, 2], "threshold", thresholds=[0.5, 0], min_confidence=0.0, sample="coupled"
    ),
    "coupled sd2 by cost": lambda model: SD2(
        model, [1, 2], nodes=16, costs=COSTS, calibration=WARM_CALIBRATION, sample="coupled"
    ),
}
# Noise has no confidence: the first exit is right by chance, the second nearly always, whatever they say.
CALIBRATION = Calibration(
    "any",
    {"sd2:1": Calibrator((0.0, 1.0), (0.1, 0.5)), "sd2:2": Calibrator((0.0, 0.1, 1.0), (0.05, 0.7, 0.95))},
    {"1>1@2": Calibrator((0.0, 1.0), (0.1, 0.9)), "1>2@2": Calibrator((0.0, 1.0), (0.8, 0.9))},
)
# Retrieved trees are cut by what another node costs, and it costs little.
CHEAP = Costs({"target": PassCost((1, 64), (1.0, 1.1))})
# Drafting is cheap, so that it is done; a whole block is dear enough not to be run for every node.
COSTS = Costs({
    "target": PassCost((1, 16), (1.0, 1.5)),
    "sd2:1": PassCost((1, 16), (0.002, 0.004)),
    "sd2:2": PassCost((1, 16), (0.01, 0.1)),
})  # fmt: skip
# In a mix, what others found makes a draft's pass worth less: verifying costs little, so that trees stay deep.
CHEAP_TO_VERIFY = Costs({**COSTS.passes, **CHEAP.passes})
SMALL_COSTS = Costs({"target": PassCost((1, 16), (1.0, 1.5)), "small": PassCost((1, 16), (0.02, 0.04))})
WARM_CALIBRATION = Calibration(
    "any",
    {"small": Calibrator((0.0, 1.0), (0.1, 0.9)), **CALIBRATION.curves},
    CALIBRATION.covered,
    temperature=0.9,
    coupled=True,
)


OWN_DRAWS = {f"{rule}-{k}": (rule, k) for rule, k in (("token", 1), ("block", 1), ("token", 2), ("traversal", 2))}


def spread(every: int, *axes: Sequence[Any] | Mapping[str, Any]) -> list[Any]:
    """All combinations; one in `every` is quick, in turn, the others are slow. Of three axes the quick ones still have
    every two values together, of two axes every value."""
    labelled = [axis if isinstance(axis, Mapping) else {str(value): value for value in axis} for axis in axes]
    return [
        pytest.param(
            *(value for _, (_, value) in chosen),
            id="-".join(label for _, (label, _) in chosen),
            marks=pytest.mark.slow if sum(at for at, _ in chosen) % every else (),
        )
        for chosen in itertools.product(*(list(enumerate(axis.items())) for axis in labelled))
    ]


@functools.cache
def models(kind: str) -> tuple[Any, Any]:
    model = tiny_model(kind)
    return model, shaken(model, 0.06)


@functools.cache
def plain_tokens(kind: str, settings: Settings) -> list[list[int]]:
    return tokens(decode(HFTarget(models(kind)[0]), Empty(), make_rows(settings)))


@pytest.fixture(params=ARCHITECTURES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(kind: str) -> tuple[Any, Any]:
    """A target and a draft model that is right often, and wrong often."""
    return models(kind)


@pytest.fixture
def plain(kind: str) -> list[list[int]]:
    return plain_tokens(kind, Settings())


@pytest.fixture
def plain_sampled(kind: str) -> list[list[int]]:
    return plain_tokens(kind, SAMPLED)


def test_plain_decoding_equals_transformers_generate(pair: tuple[Any, Any], plain: list[list[int]]) -> None:
    for row, ours in zip(make_rows(Settings()), plain):
        theirs = pair[0].generate(
            torch.tensor([row.ids]), max_new_tokens=row.left, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert theirs[0, len(row.ids) :].tolist() == ours


@pytest.mark.parametrize(("kind", "name", "batch_size"), spread(3, ARCHITECTURES, [*DRAFTERS], [1, 3, 8]))
def test_greedy_tokens_equal_plain_decoding(
    pair: tuple[Any, Any], plain: list[list[int]], name: str, batch_size: int
) -> None:
    generations = decode(HFTarget(pair[0]), DRAFTERS[name](pair[1]), make_rows(Settings()), batch_size)
    assert tokens(generations) == plain
    assert_tried_hard(generations)


@pytest.mark.parametrize(("kind", "batch_size"), spread(2, ARCHITECTURES, [1, 8]))
def test_the_controls_are_lossless_and_bound_the_rest(
    pair: tuple[Any, Any], plain: list[list[int]], batch_size: int
) -> None:
    answers = {str(i): answer for i, answer in enumerate(plain)}
    steps = {}
    for drafter in (oracle(), adversary(), Empty()):
        if not isinstance(drafter, Empty):
            drafter.learn(answers)
        generations = decode(HFTarget(pair[0]), drafter, make_rows(Settings()), batch_size)
        assert tokens(generations) == plain
        steps[drafter.name] = sum(len(generation.traces) for generation in generations)
    committed = sum(len(answer) for answer in plain)
    assert steps["empty"] == steps["adversary"] == committed
    assert steps["oracle"] == sum(-(-len(answer) // 9) for answer in plain)


@pytest.mark.parametrize(("kind", "name"), spread(2, ARCHITECTURES, [*DRAFTERS]))
def test_outright_drafts_give_the_same_tokens_as_plain_sampling_with_the_same_seed(
    pair: tuple[Any, Any], plain_sampled: list[list[int]], name: str
) -> None:
    generations = decode(HFTarget(pair[0]), DRAFTERS[name](pair[1]), make_rows(SAMPLED), 3)
    assert tokens(generations) == plain_sampled
    assert_tried_hard(generations, deep=1)


@pytest.mark.parametrize(("kind", "name", "batch_size"), spread(2, ARCHITECTURES, [*COUPLED], [1, 3]))
def test_coupled_drafts_give_the_same_tokens_as_plain_sampling_and_come_deep(
    pair: tuple[Any, Any], plain_sampled: list[list[int]], name: str, batch_size: int
) -> None:
    generations = decode(HFTarget(pair[0]), COUPLED[name](pair[1]), make_rows(SAMPLED), batch_size)
    assert tokens(generations) == plain_sampled
    assert_tried_hard(generations, deep=3)


@pytest.mark.parametrize(("kind", "settings"), spread(2, ARCHITECTURES, EITHER))
def test_outright_drafts_are_looked_up_by_traversal_too(kind: str, pair: tuple[Any, Any], settings: Settings) -> None:
    rows = make_rows(settings, 30)
    wanted = [answer[: row.left] for answer, row in zip(plain_tokens(kind, settings), rows)]
    generations = decode(HFTarget(pair[0]), DRAFTERS["tree"](pair[1]), rows, 3, "traversal")
    assert tokens(generations) == wanted
    assert_tried_hard(generations, deep=1)
    assert not any(trace.jointly for generation in generations for trace in generation.traces)


@pytest.mark.parametrize(("kind", "way"), spread(2, ARCHITECTURES, OWN_DRAWS))
def test_what_the_target_draws_itself_is_accepted_whole(pair: tuple[Any, Any], way: tuple[str, int]) -> None:
    """Draft and target have one distribution at every node, so the first trial of each is accepted by every rule; the
    tokens are others than plain decoding's, and differ from row to row."""
    rule, top_k = way
    mixed: dict[str, Any] = {} if top_k == 1 else {"peaked": 1.0}  # no nodes whose first trial is drawn from the rest
    drafter = SmallLM(pair[0], num_draft_tokens=3, top_k=top_k, nodes=9, sample="drawn", **mixed)
    generations = decode(HFTarget(pair[0]), drafter, make_rows(SAMPLED, 30), 3, rule)
    for generation in generations:
        assert all(trace.accepted == min(3, trace.depth) for trace in generation.traces)
        assert any(trace.accepted == 3 for trace in generation.traces)
        assert {trace.jointly for trace in generation.traces if trace.nodes} == {rule != "token"}
    assert len({token for generation in generations for token in generation.token_ids}) >= 8


def retrieved(name: str, target: HFTarget, answered: Sequence[Row], folder: Path) -> Drafter:
    """A drafter with a store of these rows' answers, one token in eight changed: drafts are right, and wrong."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for row in answered:
        changed = (torch.rand(len(row.ids), generator=generator) < 0.125).tolist()
        others = torch.randint(3, 61, (len(row.ids),), generator=generator).tolist()
        ids = [other if change else token for token, other, change in zip(row.ids, others, changed)]
        samples.append(Rendered(ids, [0] * row.prompt_tokens + [1] * (len(ids) - row.prompt_tokens)))
    if name == "dresd":
        pytest.importorskip("faiss", reason="DReSD's stores need the extra `retrieval`")
        dresd_build.build_store(target, lambda: samples, folder, dims=16)
        return Dresd(str(folder), min_confidence=0, costs=CHEAP)
    pytest.importorskip("pydivsufsort", reason="REST's stores need the extra `retrieval`")
    documents = [[Document(str(i), np.array(sample.token_ids))] for i, sample in enumerate(samples)]
    manifest = Manifest("rest", "any", target.vocab_size, "uint16")
    build(folder, manifest, lambda skip: iter(documents[skip:]), make_parts, job={}, chunk_tokens=150)
    return Rest(str(folder), nodes=24, costs=CHEAP)


@pytest.mark.parametrize(("kind", "name", "settings"), spread(2, ARCHITECTURES, ["rest", "dresd"], EITHER))
def test_retrieved_drafts_give_plain_s_tokens_in_a_batch(
    pair: tuple[Any, Any], name: str, settings: Settings, tmp_path: Path
) -> None:
    target, rows = HFTarget(pair[0]), make_rows(settings)
    wanted = tokens(decode(target, Empty(), rows, ROWS))
    generations = decode(target, retrieved(name, target, rows, tmp_path / "store"), make_rows(settings), 3)
    assert tokens(generations) == wanted
    assert_tried_hard(generations)


@pytest.mark.parametrize("name", ["tree", "pld"])
def test_penalties_see_the_prefix_and_the_path_of_their_own_row(make_model: Any, shake: Any, name: str) -> None:
    model = make_model("llama")
    rows = make_rows(PENALISED)
    wanted = []
    for row in rows:
        kwargs = PENALISED.generation_kwargs()
        theirs = model.generate(torch.tensor([row.ids]), max_new_tokens=row.left, eos_token_id=None, **kwargs)
        wanted.append(theirs[0, len(row.ids) :].tolist())
    generations = decode(HFTarget(model), DRAFTERS[name](shake(model, 0.06)), rows, 3)
    assert tokens(generations) == wanted
    assert_tried_hard(generations, deep=1)


def test_contexts_cross_the_growth_of_the_cache(make_model: Any, shake: Any) -> None:
    model = make_model("llama")
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 61, (n,), generator=generator).tolist() for n in (5, 300, 120, 420)]

    def rows() -> list[Row]:
        return [Row(str(i), list(p), Settings(), Stops(30)) for i, p in enumerate(prompts)]

    wanted = [
        model.generate(torch.tensor([row.ids]), max_new_tokens=30, do_sample=False, eos_token_id=None)[
            0, len(row.ids) :
        ]
        for row in rows()
    ]
    target = HFTarget(model)
    generations = decode(target, DRAFTERS["tree"](shake(model, 0.06)), rows(), 2)
    assert tokens(generations) == [answer.tolist() for answer in wanted]
    assert target.lm.cache.moved >= 1
    assert_tried_hard(generations)


# Nothing in their passes depends on the data, so these must be captured.
CAPTURED = {"gemma2", "gemma3", "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"}


@pytest.mark.gpu
@pytest.mark.parametrize("settings", EITHER.values(), ids=EITHER)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_tokens_of_captured_passes_equal_plain_eager_decoding_on_cuda(
    make_model: Any,
    shake: Any,
    kind: str,
    name: str,
    batch_size: int,
    dtype: torch.dtype,
    settings: Settings,
) -> None:
    model = make_model(kind, dtype).to("cuda")
    eager, target = HFTarget(model), HFTarget(model)
    assert isinstance(eager.lm, ModelRunner)
    assert isinstance(target.lm, ModelRunner)
    assert target.lm.captured is not None
    assert kind not in CAPTURED or not target.lm.captured.refusal
    eager.lm.captured = None
    wanted = tokens(decode(eager, Empty(), make_rows(settings)))
    generations = decode(target, DRAFTERS[name](shake(model, 0.06)), make_rows(settings), batch_size)
    assert tokens(generations) == wanted
    assert_tried_hard(generations, deep=1 if settings is SAMPLED else 2)
