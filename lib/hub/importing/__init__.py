"""Downloaded folders and archives become entries of the Hub's cache."""
