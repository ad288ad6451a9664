"""arriero: a distributed, multi-node LLM serving system on Ray."""

__version__ = "0.1.0"
