"""Labels, in whatever form they are stored, become class numbers, floats or multi-hot vectors."""
