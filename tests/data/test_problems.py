import json

import pytest

from tinydet.data.problems import Problems


def test_problems__counts_everything_and_names_a_few():
    problems = Problems()
    assert not problems
    assert problems.summary() == []
    for i in range(7):
        problems.add("zero_area", f"image{i}", "cat 1,1,1,1")
    problems.add("missing_image", "lost")
    first, second = problems.summary()
    assert first.startswith("missing image files, images left out: 1 (")
    assert "lost" in first
    assert second.startswith("boxes without area, dropped: 7 (")
    assert "image0: cat 1,1,1,1" in second
    assert "image4" in second
    assert "image5" not in second
    assert second.endswith("...)")
    assert Problems(**json.loads(json.dumps(problems.as_dict()))) == problems


def test_problems__unknown_rule_is_refused():
    with pytest.raises(ValueError, match="zero_aera"):
        Problems().add("zero_aera", "a")
