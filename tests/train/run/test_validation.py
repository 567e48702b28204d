"""Validation decodes as a user of the target would."""

from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.load import load_model
from draftsmith.train.run.validation import decode


def test_validation_stops_at_the_tokenizers_end_where_the_model_names_none(target_folder):
    model, tokenizer = load_model(str(target_folder), device="cpu")
    model.generation_config.eos_token_id = None
    (endless,) = decode(HFTarget(model), Empty(), [[1, 40, 41]], 12)
    tokens = list(endless.token_ids)
    assert len(tokens) == 12
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokens[5])
    (ended,) = decode(HFTarget(model, tokenizer), Empty(), [[1, 40, 41]], 12)
    assert list(ended.token_ids) == tokens[: tokens.index(tokens[5]) + 1]
