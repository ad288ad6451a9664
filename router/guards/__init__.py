"""Guard models: prompts and verdicts of Llama Guard, and the policy over inputs and outputs."""
