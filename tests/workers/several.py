"""Call scripts one after another in the same processes: several.py PLAN, a JSON file with a list of [script, flag, ...]."""

import importlib
import json
import sys
from pathlib import Path
from typing import get_type_hints
from unittest import mock

import torch

from lib.config.cli import parse_cli


def main(path: str) -> None:
    with mock.patch.object(torch.distributed, "destroy_process_group"):  # each script ends with it
        for script, *flags in json.loads(Path(path).read_text()):
            script_main = importlib.import_module(script.removesuffix(".py")).main
            script_main(parse_cli(get_type_hints(script_main)["config"], flags))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
