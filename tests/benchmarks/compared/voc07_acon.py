"""ACON-C for ReLU6 where the backbone learns; base: voc07.py."""

from dataclasses import replace

from voc07 import PLACES
from voc07 import experiment as plain

model = replace(plain.model, activation="acon-c", activation_where=PLACES)
experiment = replace(plain, name="", model=model)
