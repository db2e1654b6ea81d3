"""Attention in eight-bit floats (e4m3), forward only. Start at ``reference``."""
