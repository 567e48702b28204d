"""What runs in speculators' own environment: it makes, saves and runs tiny heads. It imports nothing of ours.

    python peer.py make CASES.json       save each case's head, and what it says of the case's inputs
    python peer.py run CASES.json        load each case's head, and write what it says
    python peer.py time CASES.json       for each line of standard input, a number of steps: CPU seconds of as many
                                         forward and backward passes of the first case's head; first of all, "ready"

A case: `folder` of the head, `inputs` and `outputs` (safetensors), `layers`, `switches`, `sizes`, `steps`. Inputs:
`features` [T, 3 H] and `tokens` [T], pair by pair, and to be timed with `last` [T, H], the target's last states.
Outputs: `logits.t` [T, V] of step t of the unrolled pass.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def make(case: dict[str, Any]) -> Any:
    """A random head, saved."""
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import CONFIG_MAPPING

    proposal = GreedyTokenProposalConfig(speculative_tokens=case["steps"])
    verifier = VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"])
    attention = case.get("attention", "eager")
    layer = CONFIG_MAPPING[case["layers"]](**case["sizes"], attn_implementation=attention)
    layer._attn_implementation = attention
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=case["draft_vocab_size"],
        eagle_aux_hidden_state_layer_ids=case["layer_ids"],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3", proposal_methods=[proposal], default_proposal_method="greedy", verifier=verifier
        ),
        **case["switches"],
    )
    torch.manual_seed(case["seed"])
    model = Eagle3DraftModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape))
    vocab_size = case["sizes"]["vocab_size"]
    if case["draft_vocab_size"] < vocab_size:
        ids = torch.randperm(vocab_size)[: case["draft_vocab_size"]].sort().values
        t2d = torch.zeros(vocab_size, dtype=torch.bool)
        t2d[ids] = True
        model.load_vocab_mappings(t2d, ids - torch.arange(len(ids)))
    model.save_pretrained(case["folder"])
    return model


def load(case: dict[str, Any]) -> Any:
    """The head that is in the case's folder."""
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

    config = Eagle3SpeculatorConfig.from_pretrained(case["folder"])
    config.transformer_layer_config._attn_implementation = "eager"
    return Eagle3DraftModel.from_pretrained(case["folder"], config=config)


def unrolled(model: Any, case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The logits of each step over the case's pairs."""
    inputs = load_file(case["inputs"])
    said: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda module, given, output: said.append(output.detach()[0]))
    tokens = inputs["tokens"][None]
    with torch.no_grad():
        model.eval()(inputs["features"][None], tokens, torch.zeros_like(tokens), ttt_steps=case["steps"])
    hook.remove()
    return {f"logits.{step}": one.contiguous() for step, one in enumerate(said)}


def time_steps(case: dict[str, Any]) -> None:
    """Training steps without an optimiser, as many as each line of standard input says. The losses are the eager ones:
    the fused ones need a GPU."""
    from speculators.losses import resolve_loss_config

    losses = resolve_loss_config("kl_div", "eager")
    torch.set_num_threads(1)
    model = make(case).train()
    inputs = {name: one[None] for name, one in load_file(case["inputs"]).items()}
    documents = torch.zeros_like(inputs["tokens"])
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.process_time()
        for _ in range(int(line)):
            _, loss, _ = model(
                inputs["features"], inputs["tokens"], documents, verifier_last_hidden_states=inputs["last"],
                ttt_steps=case["steps"], loss_config=losses,
            )  # fmt: skip
            loss.backward()
            model.zero_grad(set_to_none=True)
        print(time.process_time() - began, flush=True)


def main(action: str, path: str) -> None:
    cases = json.loads(Path(path).read_text())
    if action == "time":
        time_steps(cases[0])
        return
    for case in cases:
        model = make(case) if action == "make" else load(case)
        save_file(unrolled(model, case), case["outputs"])


if __name__ == "__main__":
    main(*sys.argv[1:])
