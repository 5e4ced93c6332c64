"""The files that have the cases of the zoo."""

from __future__ import annotations

from importlib import import_module

FILES = ("language", "pictures", "generative", "structures")


def load_cases() -> None:
    """Register all cases in `zoo.case.CASES`, without importing their packages."""
    for name in FILES:
        import_module(f"zoo.{name}")
