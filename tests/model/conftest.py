"""Tiny classifiers of several architectures."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny_models import save_classifier


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a classifier of a model type, made once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_classifier(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder
