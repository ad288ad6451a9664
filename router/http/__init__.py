"""The OpenAI-compatible HTTP interface: JSON in, the same calls as gRPC's, JSON or events out."""
