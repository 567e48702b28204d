"""A head's first matrix is trained in the scale of its target's states, and saved as an ordinary one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.infer.models.runner.taps import Taps
from draftsmith.train.data.batches import assemble
from draftsmith.train.data.channel_scale import ChannelScale, measured_scale
from draftsmith.train.drafts.eagle import EagleBuilder
from draftsmith.train.drafts.trainable import BuildContext

NAMES = ("layer:1", "layer:2")
TIMES = 100


@pytest.fixture
def loud(make_model: Any) -> Any:
    """A target with a residual stream as large as a trained one's, and one channel that is larger still."""
    target = make_model("llama")
    with torch.no_grad():
        embedding = target.get_input_embeddings().weight
        embedding.mul_(TIMES)
        embedding[:, 5] *= 30
    return target


def build(target: Any, corpus: Any, **options: Any) -> Any:
    run = BuildContext(target, corpus, torch.float64, 3, trained_for=None)
    return EagleBuilder(layers=[1, 2], draft_vocab=0, **options).build(run)


def states(target: Any, corpus: Any, sample: int) -> torch.Tensor:
    """[T, F] where they are learned from."""
    batch = assemble(corpus, [[sample]], int(corpus.lengths[sample]))
    with torch.no_grad(), Taps(target).taking(NAMES) as taken:
        target(batch["input_ids"], use_cache=False)
    return torch.cat([taken[name][0] for name in NAMES], -1)[batch["labels"][0] >= 0]


def test_the_scale_is_that_of_the_positions_that_are_learned(loud: Any, make_corpus: Any) -> None:
    corpus = make_corpus([40, 60])
    read = torch.cat([states(loud, corpus, sample) for sample in range(2)])
    found = measured_scale(loud, corpus, NAMES)
    torch.testing.assert_close(found.double(), read.square().mean(0).sqrt(), rtol=1e-5, atol=0)
    assert found[5] > 10 * found.median()
    with torch.no_grad():
        loud.get_input_embeddings().weight[:, 7] = 0
    assert measured_scale(loud, corpus, NAMES).min() > 0


@pytest.mark.parametrize("switch", ["", "norm_before_fc"])
def test_a_fresh_head_reads_states_of_size_one(loud: Any, make_corpus: Any, switch: str) -> None:
    corpus = make_corpus([40, 60])
    draft = build(loud, corpus, **({switch: True} if switch else {}))
    read = dict(zip(NAMES, states(loud, corpus, 0).chunk(2, -1)))
    size = float(draft.model.joined(read).detach().square().mean().sqrt())
    scaled = any(isinstance(module, ChannelScale) for module in draft.modules())
    assert scaled == (not switch)  # a norm does the same
    if not switch:
        assert 0.5 < size < 2
        plain = torch.cat(list(read.values()), -1) @ torch.randn(64, 32, dtype=torch.float64).mul(0.02)
        assert float(plain.square().mean().sqrt()) > 10 * size


def test_a_step_changes_no_channel_more_than_others(loud: Any, make_corpus: Any) -> None:
    """What AdamW moves by its learning rate in every weight, whatever the weight is multiplied with."""
    corpus = make_corpus([40, 60])
    draft, read = build(loud, corpus), states(loud, corpus, 0)
    before = draft.model.fc.weight.detach().clone()
    with torch.no_grad():
        for name, weight in draft.named_parameters():
            if name.endswith("fc.parametrizations.weight.original"):
                weight.add_(1e-3)
    moved_F = ((draft.model.fc.weight.detach() - before)[0] * read).square().mean(0).sqrt()
    assert moved_F.max() < 3 * moved_F.median()
    assert 5e-4 < moved_F.median() < 2e-3


def test_it_is_saved_as_an_ordinary_weight_that_gives_the_same(loud: Any, make_corpus: Any, tmp_path: Any) -> None:
    corpus = make_corpus([40, 60])
    draft, read = build(loud, corpus), dict(zip(NAMES, states(loud, corpus, 0).chunk(2, -1)))
    joined = draft.model.joined(read).detach()
    again = [tmp_path / "one", tmp_path / "two"]
    draft.save(again[0], None, "")
    saved = load_file(again[0] / "model.safetensors")
    assert not [name for name in saved if "parametriz" in name or "scale" in name]
    torch.testing.assert_close(torch.cat(list(read.values()), -1) @ saved["fc.weight"].double().T, joined)
    gone_on = EagleBuilder(init=str(again[0])).build(BuildContext(loud, corpus, torch.float64, 4))
    assert any(isinstance(module, ChannelScale) for module in gone_on.modules())
    torch.testing.assert_close(gone_on.model.joined(read), joined)
