"""A setting on the command line takes effect, or is refused."""

import pytest

from tinydet.config import ConfigError, Experiment
from tinydet.experiment_file import override


@pytest.mark.parametrize(
    ("assignment", "off", "on"),
    [
        ("model.attention_place=se", "model.attention=none", "model.attention=coord"),
        ("data.short_side=64", "data.keep_ratio=false", "data.keep_ratio=true"),
        ("data.augment.max_shift=8", "data.augment.shift=0", "data.augment.shift=0.5"),
        ("optim.milestones=0.5", "optim.schedule=cosine", "optim.schedule=step"),
        ("optim.gamma=0.5", "optim.schedule=cosine", "optim.schedule=step"),
    ],
)
def test_a_setting_takes_effect_or_is_refused(assignment, off, on):
    for assignments in ([off, assignment], [assignment, off]):
        with pytest.raises(ConfigError, match=f"{assignment}: has no effect beside {off}"):
            override(Experiment(), assignments)
    override(override(Experiment(), [on, assignment]), [off])  # What a file inherits may have none.
