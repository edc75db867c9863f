"""Benchmarks: ``python -m benchmarks.FOLDER.NAME``, in the repository's root.

Each prints a table and, with ``--json FILE``, writes a record, with the machine, and a picture beside it; the
committed records are in ``results``. ``python -m benchmarks.readme.update`` writes their tables into README
and docs.
"""
