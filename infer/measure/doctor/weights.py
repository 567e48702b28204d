"""Checks of weights: whole, finite in the dtype they run in, equal to the reference's; embedding and head apart.

Legend: V vocabulary, D hidden, N tokens of answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from draftsmith.infer.measure.doctor.finding import Finding

# Rows compared of an embedding or a head.
ROWS = 4096
# Cosines of rows: the same up to rounding; of one origin, and trained on.
SAME, RELATED = 0.99, 0.3
# The relative difference that rounding to bfloat16 explains.
ROUNDING = 2**-7
# How far the largest eigenvalue of a random matrix may lie beyond its limit, and the spread of its rows' norms.
BEYOND_LIMIT, BEYOND_SPREAD = 1.25, 1.6


# Mends a suspected fault in memory, as long as one is inside.
Mend: TypeAlias = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class MendTried:
    """A suspected fault, mended in memory: `gained` nats per token, 0 if it is not there."""

    suspected: str
    gained: float
    mend: str

    def finding(self, check: str) -> Finding:
        found = f"{self.suspected}; mended, it predicts the target's answers better by {self.gained:.2f} nats a token"
        return Finding.wrong(check, found, self.mend)


def best_of(trials: Sequence[MendTried]) -> MendTried | None:
    """The trial that gains most; None if none does."""
    best = max(trials, key=lambda one: one.gained, default=None)
    return best if best is not None and best.gained > 0 else None


def likeliest(trials: Mapping[str, Sequence[MendTried]]) -> dict[str, list[MendTried]]:
    """By check, with the gain of the best mend alone: others gain by chance, or what the best one gains better."""
    most = max((one.gained for some in trials.values() for one in some), default=0.0)
    return {
        check: [one if one.gained == most else replace(one, gained=0.0) for one in some]
        for check, some in trials.items()
    }


def check_files(missing: Sequence[str], kind: str) -> Finding:
    """`missing`: weights that the files lack."""
    if not missing:
        return Finding.ok("files", f"{kind}, all weights are there")
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return Finding.wrong(
        "files",
        f"no {', '.join(missing[:3])}{more}: random numbers take their place at every load",
        "export it again with these weights; a head that is the embedding needs tie_word_embeddings true",
    )


def check_dtype(
    weights: Iterable[tuple[str, torch.Tensor]], run_in: torch.dtype, finite: Callable[[], bool] | None
) -> Finding:
    """`run_in`: the target's dtype, which a draft takes. `finite`: runs it so; None if it cannot be run."""
    check, largest = "dtype", torch.finfo(run_in).max
    stored, overflowing = set(), list[str]()
    for name, one in weights:
        if not one.is_floating_point():
            continue
        stored.add(_named(one.dtype))
        if not bool(one.isfinite().all()):
            return Finding.wrong(
                check,
                f"{name} holds NaN or infinity, in {_named(one.dtype)}",
                "export it again from the trained weights, in bfloat16 or float32 if float16 cannot hold them",
            )
        if bool((one.abs() > largest).any()):
            overflowing.append(name)
    wider = f"run the target in bfloat16 or float32, or train the draft in {_named(run_in)}"
    if overflowing:
        return Finding.wrong(
            check, f"{overflowing[0]} overflows in the target's {_named(run_in)}, in which it is run", wider
        )
    kinds = " and ".join(sorted(stored))
    if finite is None:
        return Finding.unknown(check, f"finite as stored ({kinds}), and not run")
    if not finite():
        return Finding.wrong(check, f"its logits are NaN or infinite in the target's {_named(run_in)}", wider)
    return Finding.ok(check, f"{kinds}, run in {_named(run_in)}: weights and logits are finite")


def check_table(
    check: str,
    own_VD: torch.Tensor,
    target_VD: torch.Tensor,
    reference_VD: torch.Tensor | None,
    trials: Sequence[MendTried],
    tokens: int,
) -> Finding:
    """An embedding or a head, row by row: the reference's, the target's, shifted, or random numbers?"""
    own_VD = own_VD[:tokens]
    again = "export it again from the trained draft, with the ids of its tokenizer, or train it again"
    if reference_VD is not None and reference_VD.shape[1] == own_VD.shape[1]:
        return _as_reference(check, own_VD, reference_VD[:tokens], again)
    if own_VD.shape[1] == target_VD.shape[1]:
        near = _cosine(own_VD, target_VD[:tokens])
        moved = _shift(own_VD, target_VD[:tokens], max(near + RELATED, RELATED))
        if moved:
            return Finding.wrong(check, f"its row i is like the target's row i{-moved:+d}: ids are shifted", again)
        if near >= RELATED:
            return Finding.ok(check, f"like the target's (cosine {near:.2f})")
    if (trial := best_of(trials)) is not None:
        return trial.finding(check)
    if not looks_random(own_VD):
        return Finding.ok(check, "not random, and none of the faults that were tried")
    if looks_random(target_VD[:tokens]):
        return Finding.unknown(check, "like random numbers, but the target's is too")
    return Finding.wrong(check, "like random numbers, as before any training", again)


def check_shared(own: bool, reference: bool, other: Finding) -> Finding:
    """A head that is the embedding. `other`: the embedding's finding, which holds for both."""
    if own != reference:
        state = "is" if own else "is not"
        return Finding.wrong(
            "head",
            f"it {state} the embedding, unlike the reference's",
            f"write tie_word_embeddings {str(reference).lower()} into config.json, and export a head of its own",
        )
    return Finding("head", other.verdict, "shared with the embedding", other.mend and "as the embedding's")


def check_equal(
    own: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor], depths: tuple[int, int]
) -> Finding:
    """All other weights against the reference's. `depths`: layers of both."""
    check = "weights"
    if unknown := sorted(name for name in own if name not in reference):
        return Finding.unknown(check, f"the reference has no {unknown[0]}: it is of another shape")
    if depths[0] > depths[1]:
        return Finding.unknown(check, f"it has {depths[0]} layers, and the reference {depths[1]}")
    shapes = [name for name in own if own[name].shape != reference[name].shape]
    if shapes:
        found, wanted = tuple(own[shapes[0]].shape), tuple(reference[shapes[0]].shape)
        return Finding.unknown(check, f"{shapes[0]} is {found}, and the reference's {wanted}: it is of another shape")
    apart = {name: difference(one, reference[name]) for name, one in own.items()}
    others = sorted((name for name, far in apart.items() if not far <= ROUNDING), key=lambda name: -apart[name])
    first = " (its first layers)" if depths[0] < depths[1] else ""
    if not others:
        return Finding.ok(check, f"the {len(own)} of no other check are the reference's{first}, up to rounding")
    if len(others) > len(own) / 2:
        return Finding.unknown(check, f"{len(others)} of {len(own)} differ: it was trained apart from the reference")
    return Finding.wrong(
        check,
        f"{len(others)} of {len(own)} differ from the reference's, most {others[0]} (by {apart[others[0]]:.0%})",
        "export it again from the reference",
    )


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The norm of the difference over the norm of `other`."""
    wide, wanted = one.detach().float().cpu(), other.detach().float().cpu()
    return float((wide - wanted).norm() / wanted.norm().clamp_min(1e-30))


def looks_random(table_VD: torch.Tensor) -> bool:
    """Whether nothing tells the rows from independent draws: no direction stands out beyond the limit of such matrices
    (Marchenko and Pastur 1967), and all rows are equally long."""
    rows_VD = table_VD[:ROWS].detach().float().cpu()
    count, width = rows_VD.shape
    if not bool(rows_VD.isfinite().all()) or float(rows_VD.std()) == 0:
        return False
    rows_VD = (rows_VD - rows_VD.mean()) / rows_VD.std()
    top = float(torch.linalg.eigvalsh(rows_VD.T @ rows_VD / count)[-1])
    norms_V = rows_VD.norm(dim=1)
    # Rows of padding are often zeros: the median and quartiles do not see a few of them.
    low, middle, high = torch.quantile(norms_V, torch.tensor([0.25, 0.5, 0.75])).tolist()
    spread = (high - low) / 1.349 / middle
    return top < BEYOND_LIMIT * (1 + (width / count) ** 0.5) ** 2 and spread < BEYOND_SPREAD / (2 * width) ** 0.5


def _as_reference(check: str, own_VD: torch.Tensor, reference_VD: torch.Tensor, again: str) -> Finding:
    near = _cosine(own_VD, reference_VD)
    if near >= SAME:
        return Finding.ok(check, "the reference's")
    if moved := _shift(own_VD, reference_VD, SAME):
        return Finding.wrong(check, f"its row i is the reference's row i{-moved:+d}: ids are shifted", again)
    if near >= RELATED:
        return Finding.unknown(check, f"like the reference's (cosine {near:.2f}), and trained apart from it")
    random = ", and like random numbers" if looks_random(own_VD) else ""
    return Finding.wrong(check, f"not the reference's (cosine {near:.2f}){random}", again)


def _cosine(one_VD: torch.Tensor, other_VD: torch.Tensor) -> float:
    """The median cosine of rows of one index, both tables without their mean row."""
    count = min(len(one_VD), len(other_VD), ROWS)
    mine, theirs = (rows[:count].detach().float().cpu() for rows in (one_VD, other_VD))
    near_V = torch.nn.functional.cosine_similarity(mine - mine.mean(0), theirs - theirs.mean(0), dim=1)
    return float(near_V.nan_to_num(0.0).median())


def _shift(own_VD: torch.Tensor, other_VD: torch.Tensor, least: float) -> int:
    """By how many places the rows are moved (+1: row i is the other's row i - 1); 0 if they are not."""
    later, earlier = _cosine(own_VD[1:], other_VD[:-1]), _cosine(own_VD[:-1], other_VD[1:])
    best = max(later, earlier)
    return 0 if best < least else 1 if best == later else -1


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
