"""Numbers by which compiled graphs, which hold no objects, find hash tables."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .hash_tables import HashTables

_NUMBERS = itertools.count()
_LIVE: weakref.WeakValueDictionary[int, HashTables] = weakref.WeakValueDictionary()


def new_handle(tables: HashTables) -> int:
    """A number for ``tables``, valid in this process as long as they live."""
    handle = next(_NUMBERS)
    _LIVE[handle] = tables
    return handle


def tables_of(handle: int) -> HashTables:
    """The tables whose ``handle`` this is."""
    return _LIVE[handle]
