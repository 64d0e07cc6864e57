"""YOLOF (arXiv 2103.09460): anchors, matching, encoder, head, losses, decoding, the detector."""
