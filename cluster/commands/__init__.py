"""The commands of `arriero`, one file for each group of them."""
