"""Distributions that the random tail is drawn from."""
