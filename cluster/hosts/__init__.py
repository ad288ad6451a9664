"""The machines: nodes of the Ray cluster, the local cluster, and the checks of `arriero doctor`."""
