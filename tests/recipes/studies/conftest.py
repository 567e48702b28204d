"""The conversations and the target folder that the tests of training use."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("train_conftest", Path(__file__).parents[2] / "train" / "conftest.py")
_train = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_train)
chats, target_folder = _train.chats, _train.target_folder
