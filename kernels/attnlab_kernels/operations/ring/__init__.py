"""Softmax attention over a ring of ranks. Start at ``attention``; ``layout`` says who owns which token."""
