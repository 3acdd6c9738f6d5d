"""No secret in the log: every line that is written passes here."""

from __future__ import annotations

import logging
import sys
from typing import Final

SHORTEST: Final = 6  # what is shorter would also be found in ordinary words


class Redacting(logging.Formatter):
    """Puts stars for secrets, wherever they stand: in a message, a traceback, what the worker printed."""

    def __init__(self, secrets: tuple[str, ...]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._secrets = sorted((secret for secret in secrets if len(secret) >= SHORTEST), key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        """The line, or lines."""
        text = super().format(record)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def log_to_stderr(secrets: tuple[str, ...]) -> None:
    """Sets up the process's log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Redacting(secrets))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
