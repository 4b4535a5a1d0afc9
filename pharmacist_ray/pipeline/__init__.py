"""A run: which artifacts a configuration stands for, and the stages that make them."""
