"""Runs the study."""

import json

from jsonargparse import auto_cli

from draftsmith.recipes.studies.head_training import head_training

print(json.dumps(auto_cli(head_training), indent=1))
