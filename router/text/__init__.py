"""Tokenizer, chat template, stop strings, images, output constraints and model card."""
