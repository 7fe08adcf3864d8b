"""The preview of a video in a terminal: characters and colours, exactly."""

import io

import numpy as np
import torch

from wan_dist.output.preview import Preview, half_blocks, why_not

RED, BLUE = (255, 0, 0), (0, 0, 255)
TRUE = {"COLORTERM": "truecolor"}


def picture(*rows: list[tuple[int, int, int]]) -> np.ndarray:
    return np.array(rows, dtype=np.uint8)


class Terminal(io.StringIO):
    encoding = "utf-8"


def test_two_pixels_are_one_character():
    text = half_blocks([picture([RED], [BLUE])], 80, true_colour=True)
    assert text == "\x1b[38;2;255;0;0m\x1b[48;2;0;0;255m▀\x1b[0m\n"


def test_colours_are_said_where_they_change():
    text = half_blocks([picture([RED, RED, BLUE], [BLUE, BLUE, BLUE])], 80, true_colour=False)
    assert text == "\x1b[38;5;196m\x1b[48;5;21m▀▀\x1b[38;5;21m\x1b[48;5;21m▀\x1b[0m\n"


def test_frames_stand_side_by_side_and_fit_the_terminal():
    frame = np.zeros((64, 96, 3), dtype=np.uint8)
    lines = half_blocks([frame] * 4, 50, true_colour=True).splitlines()
    assert {line.count("▀") for line in lines} == {4 * 11} and {line.count(" ") for line in lines} == {3}
    assert len(lines) == 4  # 64 rows of 96 in 11 columns: 7.3, of which 8 are the nearest even number


def test_small_frames_are_not_enlarged():
    assert half_blocks([picture([RED, RED], [RED, RED])], 200, true_colour=True).count("▀") == 2


def test_evenly_spaced_frames_are_kept_as_they_come(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    frames = torch.zeros(9, 2, 1, 3, dtype=torch.uint8)
    frames[:, :, :, 0] = torch.arange(9).view(9, 1, 1) * 10
    preview, terminal = Preview(9), Terminal()
    for part in frames.split([1, 4, 4]):
        preview.append(part)
    preview.show(terminal, TRUE)
    assert [f"38;2;{level};0;0m" in terminal.getvalue() for level in range(0, 90, 10)] == [
        index in (0, 3, 5, 8) for index in range(9)
    ]


def test_what_cannot_be_shown_is_said_in_one_line():
    assert why_not(Terminal(), {}) is None
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    assert "latin-1" in why_not(latin, {}) and why_not(Terminal(), {"NO_COLOR": "1"}) == "NO_COLOR is set"
    preview, terminal = Preview(1), Terminal()
    preview.append(torch.zeros(1, 2, 2, 3, dtype=torch.uint8))
    preview.show(terminal, {"NO_COLOR": "1"})
    assert terminal.getvalue() == "wan-dist: no preview: NO_COLOR is set\n"


def test_a_terminal_that_is_gone_fails_nothing():
    class Gone(Terminal):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    preview = Preview(1)
    preview.append(torch.zeros(1, 2, 2, 3, dtype=torch.uint8))
    assert preview.show(Gone(), TRUE) is None
