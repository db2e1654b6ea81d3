"""What is kept: the queue, the results and the tensors, in one SQL store."""
