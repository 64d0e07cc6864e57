"""Backbones: one factory over timm, and the models timm does not have."""
