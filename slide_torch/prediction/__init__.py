"""Prediction: the best k neurons of an input, exact and approximate."""
