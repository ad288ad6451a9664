"""Reading files: JSON objects, and why a file is not what its name says."""
