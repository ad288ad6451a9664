"""The Ray processes of a deployment: leader, slices and gateway replicas."""
