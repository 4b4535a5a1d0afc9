"""A scorer, an objective and a judge of my own."""
