"""The commands of `arriero`: a file per group of commands."""
