"""transformers without its progress bars, which come in between a command's own lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gradalign.errors import missing_extra


@contextmanager
def quiet(text: bool) -> Iterator[None]:
    """Show no progress bars of transformers meanwhile.

    Args:
        text: Whether there is anything on text to do; otherwise transformers is not imported.
    """
    if not text:
        yield
        return
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise missing_extra("transformers", "text") from error

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
