"""Programs on real data: ``python examples/NAME.py``.

Within ``common`` and ``data``, imports are relative and neither imports the other; a program imports them as
``common`` and ``data``, since Python puts its folder on the path, and benchmarks and tests, which run in the
repository's root, as ``examples.common`` and ``examples.data``.
"""
