"""Several runs side by side: which settings differ, and whether their scores do."""
