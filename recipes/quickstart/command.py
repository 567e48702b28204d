"""`draftsmith quickstart`: a target, drafts and stores for it and a page that compares them, from what is here already.

The text is Python's own standard library. Every step is a `draftsmith` command that is printed as it runs, keeps what
it made, and is passed over when it stands; so an interrupted quickstart goes on where it was. The plan is in
quickstart_steps.py, the running in quickstart_run.py.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal


def quickstart(scale: Literal["smoke", "small", "full"] = "small", out: str | None = None, seed: int = 0) -> None:
    """Train a small target and drafts on this machine's own text, and compare all ways of drafting for it.

    Example: draftsmith quickstart --scale smoke

    Args:
        scale: smoke (a minute), small (about ten) or full (about an hour).
        out: the folder for everything; quickstart/SCALE where none is given.
        seed: of the text's order, of training and of measuring.
    """
    from draftsmith.recipes.quickstart.run import run_steps
    from draftsmith.recipes.quickstart.scales import SCALES
    from draftsmith.recipes.quickstart.steps import QuickstartPlan

    size = SCALES[scale]
    folder = Path(out or f"quickstart/{scale}")
    print(f"quickstart, scale {scale}: {size.says}; everything goes into {folder}")
    print("Interrupt it whenever you like: the same command goes on where it was.\n")
    began = time.perf_counter()
    steps = QuickstartPlan(folder, size, seed).steps()
    made = run_steps(steps, folder, size.seconds)
    took = f"{made} of {len(steps)} steps in {time.perf_counter() - began:.0f} s" if made else "everything is there"
    print(f"{took}\n")
    print("\n".join(_ending(folder)))


def _ending(folder: Path) -> list[str]:
    """The verdicts, where the page is, what this shows and what it does not."""
    page = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    verdicts = [line.removeprefix("## ") for line in page if line.startswith("## ")]
    target = folder / "target"
    return [
        *verdicts,
        f"report: {folder / 'report.html'}",
        "",
        "What this shows: training, stores and drafting work on this machine, and drafting changes nothing of what is",
        "said. What it does not: what an 8B model gains on a GPU. Its passes cost otherwise, and its text is another.",
        "To find out, with your model's name in the place of this one's, and your logs in that of the answers:",
        f"  draftsmith plan --target {target} --acceptance 0.7",
        f"  draftsmith replay --data {folder / 'answers.jsonl'} --tokenizer {target} --drafters "
        f"pld,rest:{folder / 'store-rest-ood'}",
        "The second needs no target and no GPU: recorded answers are all that it reads.",
    ]
