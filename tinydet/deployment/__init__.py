"""From a trained detector to what is shipped: the folded form, ONNX, the real frame rate."""
