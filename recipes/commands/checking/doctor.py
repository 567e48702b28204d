"""`draftsmith doctor`: is a draft, a head or a target what it should be?"""

from __future__ import annotations

import shutil
import sys
from json import dumps

from draftsmith.recipes.cli.ranges import IntFrom1


def doctor(
    draft: str,
    *,
    target: str | None = None,
    reference: str | None = None,
    data: list[str] | None = None,
    limit: IntFrom1 | None = 20,
    exits: list[IntFrom1] | None = None,
    max_new_tokens: IntFrom1 = 48,
    batch_size: IntFrom1 = 8,
    template: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    json: bool = False,
) -> int:
    """Check that a draft model or a head is what it should be for its target; without --target, check a target.

    One line per check: ok, wrong (with its mend), or cannot tell. Suspected faults are mended in memory: what then
    predicts the target's own answers better is named. The exit code is 1 if anything is wrong.

    Example: draftsmith doctor DRAFT --target MODEL --reference TRAINED

    Args:
        draft: folder or Hub name of a draft model (plain or sorted) or of an EAGLE, Medusa or Hydra head; or of a
            target, to be checked alone.
        target: folder or Hub name of the target that it drafts for.
        reference: the trained draft that it should equal, say before it was exported or converted.
        data: prompts to try it with: files, folders or `datasets` names; 20 built-in ones by default.
        limit: try at most this many prompts.
        exits: the exits of a sorted draft, if its config does not list them.
        max_new_tokens: token limit of each answer.
        batch_size: answers decoded together.
        template: prompt template of the target: auto (chat, or plain without one), chat (the tokenizer's own), plain, a
            format with {prompt}, or a FastChat name.
        dtype: type of the target's weights, such as bfloat16; the draft takes it too.
        device: device of the target, such as cuda or cpu.
        json: print one JSON object on the last line instead of lines.
    """
    from draftsmith.infer.measure.doctor.examine import CheckRequest, check_request, examine
    from draftsmith.infer.measure.doctor.finding import lines, report, summary
    from draftsmith.infer.measure.doctor.questions import built_in
    from draftsmith.recipes.cli.inputs import read_questions
    from draftsmith.recipes.cli.progress import progress

    asked = CheckRequest(
        draft, target or "", reference or "", exits or (), template, max_new_tokens, batch_size, dtype, device
    )
    kind = check_request(asked)
    records = built_in()[:limit] if data is None else read_questions(data, limit)
    if not records:
        raise ValueError("--data holds no prompts: give files with questions, or leave it out")
    findings = examine(asked, records, progress)
    progress.end()
    wrong = any(one.verdict == "wrong" for one in findings)
    if json:
        what = kind or ("draft" if target else "target")
        print(dumps(report(findings, {"draft": draft, "kind": what, "target": target, "prompts": len(records)})))
    else:
        print("\n".join(lines(findings, shutil.get_terminal_size().columns)))
    if wrong or not json:
        print(f"draftsmith doctor: {summary(findings)}", file=sys.stderr if wrong else sys.stdout)
    return int(wrong)
