"""The catalog's records, by family."""
