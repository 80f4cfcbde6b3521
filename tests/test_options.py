from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.system.cli import boolean, number
from lib.system.error import InputError
from lib.system.options import CHOSEN, Options, noted, setting


@dataclass(frozen=True, kw_only=True)
class Tea(Options):
    kind: str = setting("leaves", "black or green", "black")
    grams: float = setting("leaves", "of leaves, 1% of the water", type=number(float, -9, 99))
    minutes: int = setting("water", "to draw", lambda values: 3 if values["kind"] == "black" else 2, shown="2 or 3")
    cups: tuple[int, ...] = setting("water", "of each guest", (1,), shown="one", resume="changes", nargs="+", type=int)
    sugar: bool = setting("water", "sweet", False, shown="no", action="store_true")
    milk: bool = setting("water", "white", False, flag="--with-milk", type=boolean)
    kettle: str | None = setting("water", "to start from", None, resume="started")
    strength: float = noted(lambda values: values["grams"] * values["minutes"])

    parser_texts = {"prog": "tea"}

    @classmethod
    def chosen(cls, name, values):
        return {"grams": 2.0}[name]

    @classmethod
    def chosen_text(cls, name):
        return "2.0, as the shop says"


def parsed(*argv):
    return vars(Tea.parser().parse_args(argv))


def test_what_is_not_given_has_its_default():
    assert Tea.of({}) == Tea(
        kind="black", grams=2.0, minutes=3, cups=(1,), sugar=False, milk=False, kettle=None, strength=6.0
    )
    green = Tea.of({"kind": "green", "grams": None, "cups": [2, 3], "spoon": 1})
    assert (green.minutes, green.grams, green.cups, green.strength) == (2, 2.0, (2, 3), 4.0)
    assert green.as_dict()["cups"] == [2, 3]


def test_flags_and_help(capsys):
    assert set(parsed().values()) == {None} and "strength" not in parsed()
    argv = ["--kind", "green", "--cups", "1", "2", "--sugar", "--with-milk", "true", "--grams=-1"]
    found = {key: value for key, value in parsed(*argv).items() if value is not None}
    assert found == {"kind": "green", "cups": [1, 2], "sugar": True, "milk": True, "grams": -1.0}
    with pytest.raises(SystemExit):
        parsed("--help")
    text = " ".join(capsys.readouterr().out.split())
    for line in (
        "black or green (default: black)",
        "of leaves, 1% of the water (default: 2.0, as the shop says)",
        "to draw (default: 2 or 3)",
        "of each guest (default: one)",
        "to start from (default: none)",
    ):
        assert line in text
    assert text.index("leaves:") < text.index("water:")


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "kind": st.text("ab -=", min_size=1).filter(lambda text: text != "--"),  # which argparse takes away
            "grams": st.floats(-9, 99),
            "minutes": st.just(7),
            "cups": st.lists(st.integers(0, 99), min_size=1, max_size=3),
            "sugar": st.booleans(),
            "milk": st.booleans(),
        },
    )
)
def test_the_command_line_of_a_setting_gives_it_back(given):
    options = Tea.of(given)
    again = vars(Tea.parser().parse_args(Tea.flags(options.as_dict())))
    assert Tea.of({**again, "minutes": again["minutes"] and int(again["minutes"])}) == options


def test_what_a_continued_run_may_change():
    tea = Tea.of({"grams": 3.0})
    assert tea.continued({"cups": [4], "grams": 3.0, "kettle": "hot", "sugar": None}, "run") == Tea.of(
        {"grams": 3.0, "cups": (4,)}
    )
    with pytest.raises(InputError, match="--with-milk True: the run run has False; leave the flag out"):
        tea.continued({"milk": True}, "run")


def test_a_null_character_is_refused():
    with pytest.raises(InputError, match="null character"):
        Tea.flags({"kind": "a\0b"})


def test_chosen_is_the_default_of_a_default():
    assert Tea.__dataclass_fields__["grams"].metadata["default"] is CHOSEN
