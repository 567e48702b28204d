"""The quickstart's plan: its steps in order, each the `draftsmith` command that does it.

How large everything is stands in quickstart_scales.py; how steps are run, taken up again and timed is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from draftsmith.recipes.quickstart.corpus import ASKED, CORPUS, HELD_OUT, QUESTIONS, write_corpus
from draftsmith.recipes.quickstart.scales import QuickstartScale

# Tokens of a row in training; no question with its answer is longer.
LENGTH = 256
SERVED = ("--template", "plain")
LEARNED = (
    "--text.template", "plain", "--text.max_length", LENGTH, "--optim.name", "muon", "--optim.batch_size", 16,
    "--watch.val_prompts", 0, "--watch.val_packs", 16, "--watch.save_every", 10, "--machine.workers", 0,
)  # fmt: skip
# Verifying a few more nodes costs little here, and trees are cut to what pays once the costs are known.
SMALL = "small:{}[num_draft_tokens=8,nodes=24,width=4]"
DRAFTERS = {"sft": SMALL, "soft": "sd2:{}", "distil": SMALL}
STORES = {f"{kind}-{text}": f"{kind}:{{}}[nodes=24]" for text in ("ood", "id") for kind in ("rest", "dresd")}


@dataclass(frozen=True, slots=True)
class Step:
    """One command, or for the text one function: what it does, what it leaves, and the earlier steps that it reads.

    `proof` is what is written last; None where only the command itself knows whether it was through. `resumes`: a
    killed one goes on from what it left.
    """

    name: str
    says: str
    out: Path
    proof: Path | None
    words: Sequence[str]
    needs: Sequence[str] = ()
    resumes: bool = True
    make: Callable[[], str] | None = None


class QuickstartPlan:
    """The steps of one scale in one folder."""

    def __init__(self, folder: Path, size: QuickstartScale, seed: int) -> None:
        self.folder = folder
        self.size = size
        self.seed = seed
        self.text, self.target, self.answers = folder / "text", folder / "target", folder / "answers.jsonl"

    def steps(self) -> list[Step]:
        """In the order in which they are run."""
        return [self._corpus(), *self._target(), *self._drafts(), *self._stores(), *self._measured(), self._report()]

    def _corpus(self) -> Step:
        size = self.size
        sizes = (size.megabytes, size.answers, size.held_out, size.questions, self.seed)
        return Step(
            "text", "Python's own standard library as bare code: what is learned, and what is asked of other modules",
            self.text, self.text / QUESTIONS, list(map(str, sizes)), make=lambda: write_corpus(self.text, *sizes),
        )  # fmt: skip

    def _command(
        self, name: str, says: str, words: Sequence[object], proof: str, needs: Sequence[str], resumes: bool = True
    ) -> Step:
        out = self.folder / name
        return Step(name, says, out, out / proof if proof else None, [*map(str, words)], needs, resumes)

    def _target(self) -> list[Step]:
        size = self.size
        return [
            self._command(
                "target", f"train a target of {size.layers} layers x {size.hidden_size} from scratch",
                ["train", "target", "--data", self.text / CORPUS, "--out", self.target, "--vocab_size", size.vocab_size,
                 "--hidden_size", size.hidden_size, "--num_layers", size.layers, "--max_steps", size.target_steps,
                 "--optim.lr", 6e-3, *self._learned()], "config.json", ["text"],
            ),
            self._command(
                "answers.jsonl", "the target's own answers, drawn: in-distribution text for drafts and stores",
                ["answers", "--target", self.target, "--data", self.text / ASKED, "--out", self.answers,
                 "--preset", "nucleus", "--max_new_tokens", size.new_tokens, "--batch_size", 16, *SERVED,
                 "--seed", self.seed], "", ["text", "target"],
            ),
        ]  # fmt: skip

    def _learned(self) -> list[object]:
        return [*LEARNED, "--text.cache", self.folder / "tokenised", "--seed", self.seed]

    def _drafts(self) -> list[Step]:
        """Three ways to a draft, on the same text and answers."""
        exits = self.size.exits
        shapes: dict[str, tuple[str, list[object]]] = {
            "sft": ("a draft of one layer, fine-tuned", ["--num_layers", 1]),
            "soft": (
                f"a sorted draft that can be left after each of {exits} layers",
                ["--num_layers", exits.strip("[]").split(",")[-1], "--exits", exits],
            ),
            "distil": ("a draft of one layer, distilled: it learns what the target would say", ["--num_layers", 1]),
        }
        return [
            self._command(
                f"draft-{how}", f"train {says}",
                ["train", how, "--target", self.target, "--data", self.text / CORPUS, self.answers,
                 "--out", self.folder / f"draft-{how}", *shape, "--max_steps", self.size.draft_steps,
                 "--optim.lr", 3e-3, *self._learned()], "config.json", ["text", "target", "answers.jsonl"],
            )
            for how, (says, shape) in shapes.items()
        ]  # fmt: skip

    def _stores(self) -> list[Step]:
        """Two kinds of stores, of two texts each: other modules (OOD), and the target's own answers (ID)."""
        steps = []
        for text, data, of in (
            ("ood", self.text / CORPUS, "other modules' text"),
            ("id", self.answers, "the target's answers"),
        ):
            needs = ["text", "target", *(["answers.jsonl"] if text == "id" else [])]
            few = ["--limit", self.size.documents] if text == "ood" else []
            sparse, dense = f"store-rest-{text}", f"store-dresd-{text}"
            steps += [
                self._command(
                    sparse, f"a sparse store (REST) of {of}",
                    ["store", "build", "rest", "--data", data, "--tokenizer", self.target,
                     "--out", self.folder / sparse, "--template", "plain"], "store.json", needs,
                ),
                self._command(
                    dense, f"a dense store (DReSD) of {of}, keyed by the target's states",
                    ["store", "build", "dresd", "--target", self.target, "--data", data, "--out", self.folder / dense,
                     "--dims", 32, "--max_length", LENGTH, *few, *SERVED], "store.json", needs,
                ),
            ]  # fmt: skip
        return steps

    def _measured(self) -> list[Step]:
        size, folder = self.size, self.folder
        made = {f"draft-{name}": (name, spec) for name, spec in DRAFTERS.items()}
        made |= {f"store-{name}": (name, spec) for name, spec in STORES.items()}
        drafters = ",".join(f"{name}={spec.format(folder / out)}" for out, (name, spec) in made.items())
        peers = f"generate,prompt_lookup,assistant:{folder / 'draft-distil'}"
        common = ["--target", self.target, "--max_new_tokens", size.new_tokens, "--min_distinct", size.min_distinct,
                  *SERVED, "--seed", self.seed]  # fmt: skip
        needs = ["text", "target", *made]
        asked = ["bench", *common, "--data", self.text / QUESTIONS, "--drafters"]
        return [
            self._command(
                "calibration", "what each drafter's confidence is worth, and what passes cost here",
                ["calibrate", *common, "--data", self.text / HELD_OUT, "--drafters", drafters,
                 "--seconds", size.cost_seconds, "--out", folder / "calibration"], "results.json", needs, False,
            ),
            self._command(
                "bench-greedy", "bench, greedy: every drafter, controls (nothing, always right, always wrong), and "
                "transformers' own decoding",
                [*asked, f"pld,{drafters},empty,oracle,adversary", "--peers", peers, "--out", folder / "bench-greedy"],
                "results.json", [*needs, "calibration"], False,
            ),
            self._command(
                "bench-drawn", "bench, sampled at temperature 0.8",
                [*asked, f"pld,{drafters},empty", "--temperature", 0.8, "--out", folder / "bench-drawn"],
                "results.json", [*needs, "calibration"], False,
            ),
        ]  # fmt: skip

    def _report(self) -> Step:
        runs, page = ["bench-greedy", "bench-drawn"], self.folder / "report.html"
        words = ["report", *(str(self.folder / run) for run in runs), "--out", str(page)]
        says = "one page of both: which drafter to use, and why"
        return Step("report", says, page, page.with_suffix(".md"), words, runs)
