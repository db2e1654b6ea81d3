"""Who runs it: the dispatcher, the Ray tasks and the child process that holds the device."""
