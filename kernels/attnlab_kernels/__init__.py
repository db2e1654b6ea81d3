"""What attention is: mechanisms, operations, masks, caches."""
