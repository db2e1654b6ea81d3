"""Attention over one small latent a token."""
