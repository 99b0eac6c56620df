"""The Hub's cache on disk: its layout, its files, and how something new gets into it."""
