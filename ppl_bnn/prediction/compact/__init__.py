"""The small, fast form of a pruned network."""
