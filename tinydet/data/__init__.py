"""Data sets in VOC layout, their augmentation, and loaders of batches."""
