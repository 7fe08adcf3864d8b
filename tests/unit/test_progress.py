"""Progress away from a terminal: plain lines, the first and the last always, few enough not to flood a log."""

import io

import pytest

from wan_dist.output.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines(total: int, seconds: float) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(total, stream, clock)
    for _ in range(total):
        clock.now += seconds
        progress.step()
    progress.close()
    return stream.getvalue().splitlines()


def shown(total: int, seconds: float) -> list[str]:
    return [line.split("  ")[0] for line in lines(total, seconds)]


@pytest.mark.parametrize("total", [1, 2, 3, 50])
def test_slow_steps_are_all_shown(total):
    assert shown(total, 2.0) == [f"step {n}/{total}" for n in range(1, total + 1)]


def test_fast_steps_show_the_first_the_last_and_few_between():
    assert shown(100, 0.001) == ["step 1/100", "step 100/100"]
    assert shown(11, 0.25) == [f"step {n}/11" for n in (1, 3, 5, 7, 9, 11)]


def test_a_line_says_the_pace_and_what_is_left():
    assert lines(4, 2.0)[0] == "step 1/4  2.00 s/step  0:06 left"
    assert lines(4, 2.0)[-1] == "step 4/4  2.00 s/step  0:00 left"


@pytest.mark.parametrize(("seconds", "left"), [(1.0, "0:01"), (303.0, "5:03"), (3903.0, "1:05:03"), (59.6, "1:00")])
def test_time_left(seconds, left):
    assert lines(2, seconds)[0].endswith(f"  {left} left")


def test_every_line_is_flushed():
    flushed = []

    class Stream(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue())

    Progress(1, Stream(), Clock()).step()
    assert flushed[0].startswith("step 1/1")


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = Progress(3, stream)
    for _ in range(3):
        progress.step()
    progress.close()
    assert "3/3" in stream.getvalue()
    assert "step 1/3" not in stream.getvalue()
