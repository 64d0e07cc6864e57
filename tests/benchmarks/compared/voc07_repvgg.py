"""RepVGG's branches beside the 3x3 and 5x5 convs that learn; base: voc07.py."""

from dataclasses import replace

from voc07 import CONVS
from voc07 import experiment as plain

model = replace(plain.model, expand="repvgg", expand_where=CONVS)
experiment = replace(plain, name="", model=model)
