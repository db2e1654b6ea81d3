"""The mechanisms as modules, one file each."""
