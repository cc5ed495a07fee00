"""Logs that may fail without ending the run."""

from __future__ import annotations

import logging

from detectron2.utils.events import EventWriter

logger = logging.getLogger(__name__)


class OptionalWriter(EventWriter):
    """Writes with another writer until that fails, on a full disk for example, which is said once.

    Args:
        writer: the other writer.
    """

    def __init__(self, writer: EventWriter):
        self.writer: EventWriter | None = writer

    def write(self) -> None:
        """Writes the newest metrics."""
        self._try("write")

    def close(self) -> None:
        """Closes the other writer."""
        self._try("close")

    def _try(self, method: str) -> None:
        if self.writer is None:
            return
        try:
            getattr(self.writer, method)()
        except OSError as error:
            logger.warning(f"{type(self.writer).__name__} failed ({error}): training goes on without it")
            self.writer = None
