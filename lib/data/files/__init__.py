"""The user's files become rows and tables, read in one strict way for training and prediction."""
