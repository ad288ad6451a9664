"""The forms that checkpoints ship in: names and shapes, who reads what, quantized numbers."""
