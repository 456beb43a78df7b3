import pytest

from ilm_compile.errors import ScheduleError
from ilm_compile.schedule import Action, Kind


@pytest.mark.parametrize("kind", Kind, ids=str)
def test_text_and_action_convert_into_each_other(kind):
    action = Action(12, kind, 30)
    assert str(action) == f"12{kind.value}30"
    assert Action.parse(str(action)) == action


@pytest.mark.parametrize(
    "text",
    ["", "F0", "0F", "0F1xyz", "x0F1", "1FOO", "-1F0", "0F-1", " 0F0", "0F0\n", "00F0", "0F00",
     "0f0", "0SEND0", "0I0", "0UNSHARD", "0F1 0F2", "\u0660F0"],
    ids=ascii,
)  # fmt: skip
def test_other_text_is_refused(text):
    with pytest.raises(ScheduleError) as error:
        Action.parse(text)
    assert repr(text) in str(error.value)
    assert "'2F0' or '1SEND_F3'" in str(error.value)


@pytest.mark.parametrize(
    ("send", "recv"), [("1SEND_F3", "2RECV_F3"), ("2SEND_B3", "1RECV_B3")], ids=["F", "B"]
)
def test_partner_is_the_other_end_of_a_message(send, recv):
    assert str(Action.parse(send).partner) == recv
    assert str(Action.parse(recv).partner) == send


@pytest.mark.parametrize(
    ("text", "is_compute", "is_send", "is_recv"),
    [
        ("0F0", True, False, False),
        ("0B0", True, False, False),
        ("0W0", True, False, False),
        ("0SEND_F0", False, True, False),
        ("1SEND_B0", False, True, False),
        ("1RECV_F0", False, False, True),
        ("0RECV_B0", False, False, True),
    ],
)
def test_action_knows_what_it_is(text, is_compute, is_send, is_recv):
    action = Action.parse(text)
    assert (action.is_compute, action.is_send, action.is_recv) == (is_compute, is_send, is_recv)
