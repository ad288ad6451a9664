"""The wire of the front door; `arriero/v1/inference.proto` is its manual."""
