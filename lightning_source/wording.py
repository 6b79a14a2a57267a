"""How errors are told to the user."""

from __future__ import annotations

from lightning_source._lightning import MisconfigurationException


def error_in_words(error: BaseException) -> str:
    """An error as a sentence that others may follow: our own by its text, any other with the name of its class."""
    text = str(error).strip()
    if not isinstance(error, (MisconfigurationException, FloatingPointError)):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
