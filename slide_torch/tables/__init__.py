"""Hash tables over a layer's weight rows, kept fresh as the weights move."""

from .hash_tables import HashTables

__all__ = ["HashTables"]
