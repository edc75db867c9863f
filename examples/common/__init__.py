"""What the programs share: models, training loops, checkpoints, tables, plots."""
