"""The difference of two softmax maps."""
