"""The control plane: the operator that reconciles the deployment, and the Admin service."""
