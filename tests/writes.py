"""The moments right before and right after a write to the disk, at which tests kill a process."""

import builtins
import io
import os
import shutil
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch

WRITES: list[tuple[Any, str]] = [
    *((os, name) for name in ("fsync", "rename", "replace", "link", "unlink", "remove", "rmdir", "mkdir")),
    *((os, name) for name in ("open", "pwrite", "ftruncate", "chmod", "utime")),
    *((builtins, "open"), (io, "open"), (shutil, "copyfile"), (torch, "save"), (safetensors.torch, "serialize_file")),
]
"""Functions that write, as owner and name; those that open a file count only where they may make or change it."""


def writes(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether this call of the function `name` changes something on the disk."""
    mode = options.get("mode", arguments[1] if len(arguments) > 1 else "r")
    return name != "open" or (mode & os.O_CREAT != 0 if isinstance(mode, int) else bool(set(mode) & set("wax+")))


def watch_writes(note: Callable[[str], None], watched: list[tuple[Any, str]] = WRITES) -> None:
    """Call `note` with `before NAME` and `after NAME` at every write of this process, but not of processes that it forks."""
    process = os.getpid()

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if os.getpid() != process or not writes(name, arguments, options):
                return function(*arguments, **options)
            note(f"before {name}")
            result = function(*arguments, **options)
            note(f"after {name}")
            return result

        return call

    for owner, name in watched:
        setattr(owner, name, noted(name, getattr(owner, name)))
