"""What an attention map is like, pooled or in numbers a row and a column, without forming it."""
