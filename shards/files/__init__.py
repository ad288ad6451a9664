"""Reading files: JSON objects, and explanations for unusable files."""
