"""Settings tried against each other under attack, by Ray Tune."""
