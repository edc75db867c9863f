"""Trainers of other packages: ``integrations.lightning`` and ``integrations.transformers``.

Neither is imported with ``slide_torch``; each needs its package.
"""
