"""Operations: what is computed, each with its reference and its implementations."""
