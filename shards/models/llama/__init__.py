"""The dense Llama family: Llama, Mistral, and models with the same layers."""
