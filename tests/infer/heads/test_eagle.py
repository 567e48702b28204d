import pytest
import torch
from head_folders import FEATURES, VOCAB, WIDTH, eagle1, eagle3, said

from draftsmith.infer.heads.eagle import EagleDesign, default_features, rows_of
from draftsmith.infer.models.layers import weight_bytes


def test_default_states_are_before_layers_2_the_middle_and_the_third_last():
    assert default_features(32) == ("layer:2", "layer:16", "layer:29")


def test_designs_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="EAGLE version 2: 1"):
        EagleDesign(2, ("last",), WIDTH)
    with pytest.raises(ValueError, match="reads the target's last state, not layer:2"):
        EagleDesign(1, ("layer:2",), WIDTH)


@pytest.mark.parametrize("ids", [[], [1, 1], [-1, 2], [3, VOCAB]])
def test_a_draft_vocabulary_is_a_set_of_tokens(ids):
    with pytest.raises(ValueError, match="a set of token ids below 61"):
        rows_of(ids, VOCAB)


@pytest.mark.parametrize(
    ("head", "tap"), [(eagle3(), "layer:1"), (eagle3(norm_output=True), "last"), (eagle1(), "last")]
)
def test_what_is_fed_back_is_named_by_a_tap(head, tap):
    assert head.recurrent == tap


@pytest.mark.parametrize("switch", ["norm_before_residual", "norm_before_fc", "fc_norm"])
def test_every_switch_changes_what_a_head_says(switch):
    assert not torch.allclose(said(eagle3(**{switch: True})), said(eagle3()))


def test_the_order_of_the_states_matters():
    states = {name: torch.full((1, WIDTH), float(number)) for number, name in enumerate(FEATURES)}
    assert not torch.allclose(eagle3().joined(states), eagle3(features=FEATURES[::-1]).joined(states))


def test_a_pass_reads_the_targets_head_and_no_embedding():
    lent, own = eagle1(), eagle3(own_embedding=True)
    said(lent), said(own)  # lends both what they lack
    own_bytes = sum(parameter.nbytes for parameter in lent.parameters())
    assert weight_bytes(lent) == own_bytes + VOCAB * WIDTH * 4
    everything = sum(parameter.nbytes for parameter in own.parameters())
    assert weight_bytes(own) == everything - VOCAB * WIDTH * 4


def test_lent_modules_are_not_weights_of_the_head():
    head = eagle1()
    before = set(head.state_dict())
    said(head)
    assert set(head.state_dict()) == before
    assert not any(name.startswith(("lm_head", "embed_tokens")) for name in before)
