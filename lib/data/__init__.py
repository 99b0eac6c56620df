"""A data set's name or files become batches of token ids."""
