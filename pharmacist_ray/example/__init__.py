"""The example: a real chat model, data sets in plain English made by rule, and a configuration that compares selections on them."""
