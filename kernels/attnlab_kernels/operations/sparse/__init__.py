"""Softmax attention over the pairs of a sparse pattern."""
