"""The output of frozen layers, computed once and trained on from memory."""
