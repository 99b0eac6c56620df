"""Whatever a data set calls its labels becomes the numbers a model learns."""
