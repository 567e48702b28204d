"""The quickstart's plan: its three scales, and its steps, each of them one `draftsmith` command.

The target is deep and narrow, because depth makes a model slow to decode and parameters make it slow to train: a draft
of one of its layers takes a tenth of its time, as it does for models a thousand times larger. It reads a small text
three times in small batches: 5 of 16 greedy answers looped, against 10 after half as many steps of twice the rows.
It stays in float32: in bfloat16 trees are cheaper to verify, but most answers of a model this unsure end in ties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from draftsmith.recipes.quickstart.corpus import ASKED, CORPUS, HELD_OUT, QUESTIONS, write_corpus

# Tokens per training row; no question with its answer is longer.
LENGTH = 256
SERVED = ("--template", "plain")
# The temperature of the sampled bench.
DRAWN_AT = 0.8
LEARNED = (
    "--text.template", "plain", "--text.max_length", LENGTH, "--optim.name", "muon", "--optim.batch_size", 16,
    "--watch.val_prompts", 0, "--watch.val_packs", 16, "--watch.save_every", 10, "--machine.workers", 0,
)  # fmt: skip
# A few more nodes cost little to verify here, and the policy cuts trees to what pays once costs are measured.
SMALL = "small:{}[num_draft_tokens=8,nodes=24,width=4]"
DRAFTERS = {"sft": SMALL, "soft": "sd2:{}", "distil": SMALL}
# What needs no training in one tree, and retrieval beside a draft model; all parts are calibrated.
MIXES = "mix=(pld+recycle+{rest})[nodes=24],mix-distil=(pld+{small})[nodes=24]"
# transformers' assistant at its defaults and at two fixed lengths: which is best depends on the machine.
ASSISTANTS = ("", *(
    f"[num_assistant_tokens={tokens},num_assistant_tokens_schedule=constant,assistant_confidence_threshold=0]"
    for tokens in (3, 6)
))  # fmt: skip
STORES = {f"{kind}-{text}": f"{kind}:{{}}[nodes=24]" for text in ("ood", "id") for kind in ("rest", "dresd")}


@dataclass(frozen=True, slots=True)
class QuickstartScale:
    """Sizes of models, training and questions. `seconds`: what each step took on one core of an AMD EPYC 9004
    (2026-11-21; for `full` only parts were timed), `small` on two of one without AVX-512 (2026-11-22); estimates are
    scaled to this machine."""

    says: str
    megabytes: float
    vocab_size: int
    hidden_size: int
    layers: int
    exits: str
    target_steps: int
    draft_steps: int
    answers: int
    held_out: int
    questions: int
    new_tokens: int
    documents: int
    cost_seconds: int
    min_distinct: float
    seconds: dict[str, float] = field(default_factory=dict)


SCALES = {
    "smoke": QuickstartScale(
        says="about a minute; a test run, whose figures mean nothing", megabytes=0.3, vocab_size=512, hidden_size=64,
        layers=3, exits="[1,2]", target_steps=30, draft_steps=6, answers=16, held_out=10, questions=2, new_tokens=20,
        documents=6, cost_seconds=0, min_distinct=0.0,
        seconds={"text": 2, "target": 9, "draft-sft": 1, "draft-soft": 2, "draft-distil": 2, "store-dresd-ood": 1,
                 "calibration": 6, "bench-greedy": 4, "bench-drawn": 4, "report": 1},
    ),
    "small": QuickstartScale(
        says="about fifteen minutes on two cores", megabytes=0.8, vocab_size=1024, hidden_size=128,
        layers=12, exits="[1,2]", target_steps=330, draft_steps=120, answers=256, held_out=32, questions=16,
        new_tokens=64, documents=48, cost_seconds=20, min_distinct=0.5,
        seconds={"text": 2, "target": 227, "answers.jsonl": 30, "draft-sft": 20, "draft-soft": 37, "draft-distil": 63,
                 "store-dresd-ood": 8, "store-dresd-id": 5, "calibration": 96, "bench-greedy": 130,
                 "bench-drawn": 135, "report": 1},
    ),
    "full": QuickstartScale(
        says="about an hour on two cores", megabytes=5.0, vocab_size=2048, hidden_size=256,
        layers=16, exits="[1,2,4]", target_steps=1400, draft_steps=300, answers=800, held_out=80, questions=40,
        new_tokens=96, documents=400, cost_seconds=60, min_distinct=0.5,
        seconds={"text": 5, "target": 2940, "answers.jsonl": 160, "draft-sft": 110, "draft-soft": 300,
                 "draft-distil": 600, "store-dresd-ood": 120, "store-dresd-id": 60, "calibration": 130,
                 "bench-greedy": 770, "bench-drawn": 400, "report": 5},
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """One command (or, for the text, the function `make`), its output and the earlier steps that it reads.

    `proof` is the file written last; None if only the command can tell whether it finished. `resumes`: after a kill the
    command continues from what is there.
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
        """All steps, in order."""
        return [self._corpus(), *self._target(), *self._drafts(), *self._stores(), *self._measured(), self._report()]

    def _corpus(self) -> Step:
        size = self.size
        sizes = (size.megabytes, size.answers, size.held_out, size.questions, self.seed)
        return Step(
            "text", "Python's standard library as bare code: some modules to learn, others to ask about",
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
                 *self._learned(), "--optim.lr", 6e-3, "--optim.batch_size", 8], "config.json", ["text"],
            ),
            self._command(
                "answers.jsonl", "the target's own sampled answers: in-distribution text for drafts and stores",
                ["answers", "--target", self.target, "--data", self.text / ASKED, "--out", self.answers,
                 "--preset", "nucleus", "--max_new_tokens", size.new_tokens, "--batch_size", 16, *SERVED,
                 "--seed", self.seed], "", ["text", "target"],
            ),
        ]  # fmt: skip

    def _learned(self) -> list[object]:
        return [*LEARNED, "--text.cache", self.folder / "tokenised", "--seed", self.seed]

    def _drafts(self) -> list[Step]:
        """Three kinds of draft, trained on the same text and answers."""
        exits = self.size.exits
        shapes: dict[str, tuple[str, list[object]]] = {
            "sft": ("a draft of one layer, fine-tuned", ["--num_layers", 1]),
            "soft": (
                f"a sorted draft with exits after {exits} layers",
                ["--num_layers", exits.strip("[]").split(",")[-1], "--exits", exits],
            ),
            "distil": ("a draft of one layer, distilled from the target's distributions", ["--num_layers", 1]),
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
        """REST and DReSD stores, each of two texts: other modules (OOD) and the target's own answers (ID)."""
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
        distilled = folder / "draft-distil"
        store = STORES["rest-ood"].format(folder / "store-rest-ood")
        learning = f"recycle,{MIXES.format(rest=store, small=SMALL.format(distilled))}"
        peers = ",".join(["generate", "prompt_lookup", *(f"assistant:{distilled}{how}" for how in ASSISTANTS)])
        common = ["--target", self.target, "--max_new_tokens", size.new_tokens, "--min_distinct", size.min_distinct,
                  *SERVED, "--seed", self.seed]  # fmt: skip
        needs = ["text", "target", *made]
        asked = ["bench", *common, "--data", self.text / QUESTIONS, "--drafters"]
        return [
            self._command(
                "calibration", "calibrate: each drafter's confidence, and the cost of passes here",
                ["calibrate", *common, "--data", self.text / HELD_OUT, "--drafters", f"pld,recycle,{drafters}",
                 "--temperatures", f"[0,{DRAWN_AT}]", "--seconds", size.cost_seconds,
                 "--out", folder / "calibration"], "results.json", needs, False,
            ),
            self._command(
                "bench-greedy", "bench, greedy: every drafter, controls (nothing, always right, always wrong), and "
                "transformers' own decoding",
                [*asked, f"pld,{drafters},{learning},empty,oracle,adversary", "--peers", peers,
                 "--out", folder / "bench-greedy"], "results.json", [*needs, "calibration"], False,
            ),
            self._command(
                "bench-drawn", f"bench, sampled at temperature {DRAWN_AT}",
                [*asked, f"pld,{drafters},{learning},empty", "--temperature", DRAWN_AT, "--peers", peers,
                 "--out", folder / "bench-drawn"], "results.json", [*needs, "calibration"], False,
            ),
        ]  # fmt: skip

    def _report(self) -> Step:
        runs, page = ["bench-greedy", "bench-drawn"], self.folder / "report.html"
        words = ["report", *(str(self.folder / run) for run in runs), "--out", str(page)]
        says = "one page from both runs: which drafter to use, and why"
        return Step("report", says, page, page.with_suffix(".md"), words, runs)
