"""How a model is divided over ranks: heads, columns, layers and experts."""
