"""The rest drafter without a store beside SuffixDecoding (arXiv 2411.04975), answers arriving: at equal nodes.

    python -m draftsmith.recipes.studies.rest_against_suffixes --data answers.jsonl --tokenizer MODEL --peer FOLDER

Both begin with nothing and learn each answer after it was drafted for. The peer is the algorithm of vLLM's `suffix`
method, from the source distribution of arctic-inference on PyPI. Its suffix trees are an extension of their own, which
builds without the rest of the package, into a folder of its own (C++20, cmake):

    pip download arctic-inference==0.3.0 --no-binary :all: --no-deps --no-build-isolation   # where torch is installed
    tar xzf arctic_inference-0.3.0.tar.gz && pip install nanobind==2.9.2 --target nanobind-only
    cd arctic_inference-0.3.0
    PYTHONPATH=../nanobind-only cmake -S csrc/suffix_decoding -B build -DPython_EXECUTABLE=$(which python)
    cmake --build build && cp build/_C*.so arctic_inference/suffix_decoding/

and `--peer` is then the folder arctic_inference-0.3.0. As it comes, it drafts a chain of at most as many tokens as
match, ratios of 0.1 or more (vLLM's defaults too), or a tree of the same; without these two limits it uses all nodes,
and accepts most. A ratio of accepted_lengths has an interval paired by answer.
"""

from __future__ import annotations

import importlib
import json as json_module
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import Budget, Drafter, Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.row import Row
from draftsmith.infer.measure.bootstrap import speedup_interval
from draftsmith.infer.measure.metrics import per_answer
from draftsmith.infer.measure.recordings import Recording, arrived, recordings
from draftsmith.infer.measure.replay import Replay
from draftsmith.infer.text.records import read_records
from draftsmith.infer.text.templates import find_template, load_tokenizer
from draftsmith.recipes.studies import run_study
from draftsmith.retrieval.rest.drafter import Rest

MODULE = "arctic_inference.suffix_decoding"
# Name -> whether it drafts a tree, and whether without its two limits.
PEERS = {"full suffix tree": (True, True), "suffix tree": (True, False), "suffix chain": (False, False)}


def rest_against_suffixes(
    *,
    data: list[str],
    tokenizer: str,
    peer: str = "",
    template: str = "auto",
    nodes: Sequence[int] = (2, 4, 8, 16),
    skip: int = 0,
    limit: int | None = None,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Replay recorded answers as they arrive, with `rest` without a store and with suffix trees.

    Args:
        data: recorded answers with their prompts.
        tokenizer: folder or Hub name of the tokenizer of the model that gave them.
        peer: folder with the peer's built package, as described above; without it only `rest` is measured.
        template: how the prompts were rendered.
        nodes: the most nodes of a draft, one run each.
        skip: how many records to leave out at the beginning.
        limit: the most records to replay.
        seed: of the intervals.
        json: print one JSON object on the last line.
    """
    caches = suffix_caches(peer) if peer else None
    loaded = load_tokenizer(tokenizer)
    records = list(read_records(data, limit=None if limit is None else skip + limit, need="answers"))[skip:]
    streams = arrived(recordings(records, find_template(template, loaded)))
    results = {str(most): compare(streams, loaded, most, caches, seed) for most in nodes}
    _show(results)
    if json:
        tokens = sum(len(stream.answer) for stream in streams)
        print(json_module.dumps({"nodes": results, "streams": len(streams), "tokens": tokens}))


def compare(
    streams: Sequence[Recording], tokenizer: Any, nodes: int, caches: Any, seed: int
) -> dict[str, dict[str, Any]]:
    """Per drafter: its figures at this many nodes and, with a peer, the ratio of rest's accepted_length to its own."""
    drafters: dict[str, Drafter] = {"rest": Rest(nodes=nodes)}
    if caches is not None:
        drafters |= {name: Suffixes(caches, nodes, name) for name in PEERS}
    replay = Replay(streams, len(tokenizer), tokenizer, budget=Budget(nodes, nodes), seed=seed, arrival=True)
    replayed = replay.run(drafters)
    found = {name: _figures(replay.figures(one)) for name, one in replayed.items()}
    for name in drafters.keys() - {"rest"}:
        found[name]["rest_over_it"] = found["rest"]["accepted_length"] / found[name]["accepted_length"]
        found[name]["rest_over_it_interval"] = speedup_interval(
            *per_answer(replayed["rest"].done), *per_answer(replayed[name].done), seed=seed
        )
    return found


def suffix_caches(folder: str) -> Any:
    """The peer's class of suffix trees, from its package in `folder`."""
    if not (Path(folder) / "arctic_inference").is_dir():
        raise ValueError(f"{folder} has no folder arctic_inference: see this study's first lines")
    sys.path.insert(0, str(Path(folder).resolve()))
    try:
        return importlib.import_module(MODULE).SuffixDecodingCache
    except ImportError as error:
        raise ValueError(f"{MODULE} in {folder} does not load ({error}): build its extension first") from error
    finally:
        sys.path.pop(0)


class Suffixes:
    """The peer as a drafter, as PEERS names it.

    It keeps a suffix tree of the row, prompt included, and one of all answers, which grows as tokens are committed.
    """

    origin = ""
    features: tuple[str, ...] = ()
    forward_seconds = 0.0
    bytes_moved = 0

    def __init__(self, caches: Any, nodes: int, name: str) -> None:
        self.name = name
        self.caches = caches
        self.nodes = nodes
        as_tree, unlimited = PEERS[name]
        self.settings: dict[str, Any] = {"max_spec_tokens": nodes, "use_tree_spec": as_tree}
        if unlimited:
            self.settings |= {"max_spec_offset": float(nodes), "min_token_prob": 0.0}

    def pass_timers(self) -> dict[str, PassTimer]:
        return {}

    def bind(self, target: Target) -> None:
        self._cache = self.caches()

    def open(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._cache.start_request(row.key, row.ids)

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        pass

    def close(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._cache.stop_request(row.key)

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        for row, verdict in zip(rows, verdicts):
            self._cache.add_active_response(row.key, verdict.committed)

    def abandon(self, rows: Sequence[Row]) -> None:
        pass

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Any = None) -> list[Draft]:
        return [self._draft(row, budget) for row, budget in zip(rows, budgets)]

    def _draft(self, row: Row, budget: Budget) -> Draft:
        draft, placed = Draft(), {-1: -1}
        if not budget.nodes or not budget.depth:
            return draft
        found = self._cache.speculate(row.key, row.ids, **self.settings)
        for number, (token, parent) in enumerate(zip(found.token_ids, found.parents)):
            above = placed.get(parent)
            if above is not None and (above < 0 or draft.depths[above] < budget.depth):
                placed[number] = draft.outright(above, token, self.name)
        return draft


def _figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    names = ("accepted_length", "accepted_length_interval", "hit_rate", "nodes_per_step", "propose_p50_s")
    return {name: figures[name] for name in names}


def _show(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("at most", "drafter", "accepted_length", "nodes", "rest over it")
    for nodes, drafters in results.items():
        for name, figures in drafters.items():
            between = figures.get("rest_over_it_interval")
            ratio = f"{figures['rest_over_it']:.3f} [{between[0]:.3f}, {between[1]:.3f}]" if between else ""
            table.add_row(nodes, name, f"{figures['accepted_length']:.3f}", f"{figures['nodes_per_step']:.1f}", ratio)
    Console(width=80).print(table)


if __name__ == "__main__":
    run_study(rest_against_suffixes)
