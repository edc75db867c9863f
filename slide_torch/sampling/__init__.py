"""Which neurons are active: labels, candidates, tail."""
