"""Coordinate Attention behind each block that learns; base: voc07.py."""

from dataclasses import replace

from voc07 import PLACES
from voc07 import experiment as plain

model = replace(plain.model, attention="coord", attention_where=PLACES)
experiment = replace(plain, name="", model=model)
