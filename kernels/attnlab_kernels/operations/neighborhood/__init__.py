"""Softmax attention over a window of fixed size on every axis."""
