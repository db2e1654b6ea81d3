"""What advice is made of: the tree, its leaves, the tables by length, cache bytes, and the experiment. No torch."""
