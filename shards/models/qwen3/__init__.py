"""Qwen3 without experts: Llama's layers with a norm of each head of q and k."""
