"""One loop on one engine."""
