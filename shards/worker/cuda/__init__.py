"""What a slice does differently on CUDA: graphs of decode steps, results copied a step later."""
