"""Llama 4: mixture of experts, chunked attention, images."""
