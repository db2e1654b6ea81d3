"""Softmax attention. Start at ``api``; ``eager`` is the reference."""
