"""`draftsmith train distil`: options to a distilled draft, by draftsmith.train; those of every training are sft's.

No training happens here; what the options mean stands in draftsmith.train.objectives.distil, .settings and .run.
"""

from __future__ import annotations

from typing import Any

from draftsmith.recipes.cli.options_of import with_options_of
from draftsmith.recipes.cli.ranges import FloatAbove0, FloatFrom0, From0To1, IntFrom1
from draftsmith.recipes.commands.train import sft, train


@with_options_of(sft)
def distil(
    *,
    num_layers: IntFrom1 | None = None,
    preset: str | None = None,
    losses: dict[str, float] | None = None,
    temperature: FloatFrom0 = 1.0,
    tree_top_k: IntFrom1 = 4,
    sharpness: FloatAbove0 = 1.0,
    teacher: str = "live",
    teacher_top_k: IntFrom1 = 64,
    on_policy: From0To1 = 0.0,
    exits: list[IntFrom1] | None = None,
    exit_weights: list[FloatFrom0] | None = None,
    **options: Any,
) -> None:
    """Train a draft model on the target's own distribution (distillation). Run again with the same options, it goes on.

    Example: draftsmith train distil --target MODEL --data answers.jsonl --out wide --preset wide-3

    Args:
        target: folder or Hub name of the model to draft for, which is the teacher as well.
        data: conversations, best the target's own answers: files, folders or data sets on the Hub.
        num_layers: layers of the draft.
        preset: instead, a published shape: wide-1, wide-3, wide-5 (the target's width), 290M, 543M, 796M, 1.3B.
        losses: name and weight of forward_kl, reverse_kl, jsd, total_variation, cross_entropy, or of what the rule that
            will run accepts: sampled, greedy, topk; not given: forward_kl alone.
        temperature: of both distributions; 0 for a target that will be greedy (losses greedy, topk and cross_entropy
            only).
        tree_top_k: tokens that a tree will try at a node, for the loss topk.
        sharpness: what stands in for an argmax in the losses greedy and topk: softmax(sharpness x logits).
        teacher: live, or a folder for a cache of what the target says, which is made first where there is none.
        teacher_top_k: tokens per position in such a cache.
        on_policy: the share of batches whose answers the draft writes itself.
        exits: numbers of layers after which the draft can be left; the last is num_layers. Not given: one exit.
        exit_weights: weights of the exits' losses; equal where none are given.
        init: the layers that the draft begins as: first, even, fresh (at random), or the folder of a draft to train on.
        shape: hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim, if not the target's.
        seed: of order, initialisation, dropout and on-policy answers.
    """
    from draftsmith.train.drafts.shapes import preset as find_preset
    from draftsmith.train.objectives.distil import Distil

    if (num_layers is None) == (preset is None):
        raise ValueError("give either --num_layers or --preset")
    strategy = options.get("strategy", "auto")
    if on_policy and strategy.startswith(("fsdp", "deepspeed")):
        raise ValueError(f"on-policy answers are decoded with the whole draft, and {strategy} cuts it up: use ddp")
    options["num_layers"] = num_layers
    if preset is not None:
        shaped = find_preset(preset)
        options["num_layers"] = shaped.num_layers
        options["shape"] = {**shaped.sizes, **(options.get("shape") or {})} or None
    objective = Distil(
        losses or {"forward_kl": 1.0}, exits=exits, exit_weights=exit_weights, temperature=temperature,
        top_k=tree_top_k, sharpness=sharpness, teacher=teacher, teacher_top_k=teacher_top_k, on_policy=on_policy,
        seed=options.get("seed", 0),
    )  # fmt: skip
    train(objective, options)
