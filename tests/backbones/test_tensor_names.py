from hypothesis import given
from hypothesis import strategies as st

from tinydet.backbones.tensor_names import without_prefix

_part = st.sampled_from(["conv", "bn1", "stages", "stages_0", "0", "model", "module", "weight"])
_name = st.lists(_part, min_size=1, max_size=4).map(".".join)
_prefix = st.lists(_part, max_size=3).map(lambda parts: "".join(f"{part}." for part in parts))
_names = st.lists(_name, min_size=1, max_size=8, unique_by=lambda name: name.replace("_", "."))


@given(
    names=_names,
    prefix=_prefix,
)
def test_a_prefix_of_all_names_is_found_whatever_it_is(names, prefix):
    tensors = {f"{prefix}{name}": number for number, name in enumerate(names)}
    found, taken_off = without_prefix(tensors, names)
    # Another prefix may do as well where the names repeat themselves, but none is better.
    assert set(found) <= {name.removeprefix(taken_off) for name in tensors}
    assert len(found.keys() & set(names)) == len(names)
    assert all(tensors[f"{taken_off}{name}"] == number for name, number in found.items())


@given(names=_names)
def test_names_that_fit_are_left_alone(names):
    tensors = {name: number for number, name in enumerate(names)}
    assert without_prefix(tensors, names) == (tensors, "")


def test_other_parts_of_the_network_are_left_out():
    tensors = {"backbone.conv.weight": 1, "backbone.stages_0.conv.weight": 2, "head.weight": 3}
    found, prefix = without_prefix(tensors, ["conv.weight", "stages.0.conv.weight", "fc.weight"])
    assert prefix == "backbone."
    assert found == {"conv.weight": 1, "stages_0.conv.weight": 2}
