"""Tables of the examples."""

from __future__ import annotations

from .records import markdown, read

__all__ = ["images", "images_10000", "language_model", "quickstart", "recommender"]


def quickstart() -> str:
    record = read("quickstart")
    table = markdown(record["columns"], record["rows"])
    return (
        f"{table}\n\n{record['held_out']:,} held-out names, exact evaluation; {record['machine']}."
    )


def contest(name: str) -> str:
    """The table of an example that prints its own."""
    record = read(name)
    return f"{markdown(record['columns'], record['rows'])}\n\n{record['machine']}."


def language_model() -> str:
    return contest("language_model")


def recommender() -> str:
    return contest("recommender")


def images() -> str:
    return contest("images")


def images_10000() -> str:
    return f"{contest('images_10000')}\n\n{trials('images_10000')}"


def trials(name: str) -> str:
    """The learning rates that an example's contenders chose from, and what validation data said of each."""
    record = read(name)
    tried = "; ".join(
        f"{who} {', '.join(f'{lr:g}: {value:.3f}' for lr, value in found)}"
        for who, found in record["trials"].items()
    )
    return f"Learning rates tried, with the accuracy on validation images: {tried}."
