"""Tokenizer, chat templates, stop strings, images, structured outputs and the model card."""
