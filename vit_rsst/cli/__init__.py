"""The command `vit-rsst`: `parser.py` has the verbs and their options, `verbs.py` what each verb does."""

from vit_rsst.cli.parser import main

__all__ = ["main"]
