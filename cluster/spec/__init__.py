"""The deployment spec (`arriero.yaml`): fields, checks, and differences of two specs."""
