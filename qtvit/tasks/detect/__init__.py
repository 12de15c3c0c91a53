"""Object detection: boxes, and masks if the data have such."""
