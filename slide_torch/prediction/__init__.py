"""The best k neurons of an input."""
