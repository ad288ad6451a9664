"""The parts of a call: checks of its request, its prompt, and the messages about it."""
