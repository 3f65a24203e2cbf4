"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def plain(value: object) -> object:
    """Return a value as JSON has it: tensors as lists, what is not finite as null."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, whole or not at all."""
    text = json.dumps(plain(value), indent=2) + "\n"
    replace_file(path, lambda new: new.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:  # noqa: ANN401 (what a file holds is known to its reader)
    """Return what a JSON file holds, or raise ValueError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"`{path.name}` must be JSON, got {str(path)!r} with an error in it: {error}") from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside ``path`` and move it there, so that ``path`` is never half written."""
    new = path.with_name(path.name + ".new")
    write(new)
    os.replace(new, path)
