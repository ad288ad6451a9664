"""Batches of requests: lines of a file, states, the spool on disk, and the runner."""
