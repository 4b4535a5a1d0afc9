"""Processes that work for a stage: actors of Ray Data, worker groups of Ray Train, and who one of them is."""
