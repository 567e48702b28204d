"""A sorted draft of twelve layers for a target of a 7B Llama's shape trains on one large GPU; its MFU is printed.

The same steps run here on a tiny shape, so that what needs a GPU is the size alone.
"""

import csv
import statistics

import pytest
import torch

from draftsmith.infer.models.load import load_model
from draftsmith.recipes.studies.throughput import peak_flops, step_flops
from draftsmith.train.objectives.soft import SoFT
from draftsmith.train.run.config import Machine, Optim, Text, TrainConfig, Watch
from draftsmith.train.run.run import train_draft

SHAPE_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
            "num_key_value_heads": 32, "max_position_embeddings": 4096}  # fmt: skip
SHAPE_TINY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
              "num_key_value_heads": 4, "max_position_embeddings": 256}  # fmt: skip


def save_target(folder, shape, num_layers, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **shape, num_hidden_layers=num_layers, bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype=torch.bfloat16
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)  # in six steps the loss of some draws does not fall
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return folder


def train(target, data, out, *, num_layers, exits, strategy="auto", device="cpu", length=128, rows=2, steps=6):
    """(losses, model FLOP/s of the median step)."""
    plan = TrainConfig(
        target=str(target), data=[str(data)], out=str(out), num_layers=num_layers, max_steps=steps, strategy=strategy,
        text=Text(max_length=length, held_out=0.0, cache=str(out.parent / "cache")),
        optim=Optim(lr=1e-4, batch_size=rows, micro_batch_size=rows, warmup=0.0),
        machine=Machine(device=device, precision="bf16-mixed", workers=0, gradient_checkpointing=True),
        watch=Watch(val_every=0, val_prompts=0, save_every=10**6),
    )  # fmt: skip
    train_draft(SoFT(exits), plan)
    with (out / "metrics.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["kind"] == "train"]
    model, _ = load_model(str(out), device="cpu")
    rates = [
        step_flops(model, len(exits), rows * length, int(row["loss_tokens"])) / float(row["seconds"]) for row in found
    ]
    return [float(row["loss"]) for row in found], statistics.median(rates[2:])


def test_the_steps_of_the_large_run_on_a_tiny_shape(tokenizer, chats, tmp_path):
    target = save_target(tmp_path / "target", SHAPE_TINY, 4, tokenizer)
    losses, rate = train(target, chats, tmp_path / "out", num_layers=4, exits=[2, 3, 4])
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert rate > 0


def test_flops_are_six_per_weight_and_token_and_the_head_once_per_exit(tokenizer, tmp_path):
    model, _ = load_model(str(save_target(tmp_path, SHAPE_TINY, 4, tokenizer)), device="cpu")
    layer = 4 * 32 * 32 + 3 * 32 * 64
    assert step_flops(model, 3, positions=100, learned=40) == 6 * (4 * layer * 100 + 300 * 32 * 40 * 3)
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "fsdp", "deepspeed_stage_2"])
def test_a_sorted_draft_of_twelve_layers_trains_for_a_7b_target(tokenizer, chats, tmp_path, capsys, strategy):
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    free, _ = torch.cuda.mem_get_info()
    if free < 70 * 2**30:
        pytest.skip(f"{free / 2**30:.0f} GiB are free on the GPU, and 70 are needed")
    target = save_target(tmp_path / "target", SHAPE_7B, 32, tokenizer)
    losses, rate = train(
        target, chats, tmp_path / "out", num_layers=12, exits=[6, 9, 12], strategy=strategy, device="cuda",
        length=2048, rows=4, steps=12,
    )  # fmt: skip
    peak = peak_flops(torch.device("cuda"))
    share = f"MFU {rate / peak:.1%}" if peak else "MFU unknown: this device's peak is not listed"
    with capsys.disabled():
        name = torch.cuda.get_device_name()
        print(f"\n12 of 32 layers at 4096, exits 6, 9, 12, {strategy}, {name}: {rate / 1e12:.0f} TFLOP/s, {share}")
    assert losses[-1] < losses[0]
    assert len(losses) == 12
