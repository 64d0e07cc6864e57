import pytest

from tinydet.comparison.budget import parse_budget


@pytest.mark.parametrize(
    ("text", "unit", "amount"),
    [
        ("20m", "seconds", 1200),
        ("90s", "seconds", 90),
        ("1.5h", "seconds", 5400),
        ("12epochs", "epochs", 12),
        (" 1 epoch ", "epochs", 1),
        ("500Tmacs", "multiply-adds", 5e14),
        ("2.5Pmacs", "multiply-adds", 2.5e15),
        ("70Gmacs", "multiply-adds", 7e10),
    ],
)
def test_spellings(text, unit, amount):
    budget = parse_budget(text)
    assert (budget.unit, budget.amount) == (unit, amount)


@pytest.mark.parametrize(
    "text", ["", "20", "20 minutes", "0m", "-5m", "1.5epochs", "5P", "500tmacs", "m", "1e9s", "20M"]
)
def test_anything_else_is_refused_with_the_right_spellings(text):
    with pytest.raises(ValueError, match=r"--budget .*20m.*12epochs.*5Pmacs"):
        parse_budget(text)


def test_whole_epochs_that_fit():
    assert parse_budget("20m").epochs(60.0) == 20
    assert parse_budget("20m").epochs(60.1) == 19
    assert parse_budget("7epochs").epochs(1.0) == 7
    assert parse_budget("1Tmacs").epochs(1e12 / 3) == 3


def test_less_than_an_epoch_is_refused():
    with pytest.raises(ValueError, match=r"--budget 90s: one epoch takes about 1\.6m; give more"):
        parse_budget("90s").epochs(95.0)
    with pytest.raises(ValueError, match=r"one epoch takes 2\.5Tmacs"):
        parse_budget("1Gmacs").epochs(2.5e12)
