"""Linear maps chosen token by token from a set of experts."""
