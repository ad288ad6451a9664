"""The worker on CUDA: decode steps as CUDA graphs, results copied to the host a step later."""
