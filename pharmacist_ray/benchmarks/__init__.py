"""What the package costs: seconds, memory and growth, measured."""
