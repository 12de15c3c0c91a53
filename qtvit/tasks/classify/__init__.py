"""Classification: a label for each image."""
