"""TinyDet: a small detection toolkit. YOLOF on any timm backbone, re-parameterized for shipping."""

__version__ = "0.1.0"
