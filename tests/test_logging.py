"""The log reads well in a terminal, in a file and to a machine."""

import io
import itertools
import json
import logging

import numpy as np
import pytest

from revjax.logging import Progress, get_logger, setup


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def restored_logger():
    logger = get_logger()
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def logged(format="text", stream=None, level="info"):
    stream = stream or io.StringIO()
    setup(level, format, stream)
    return stream


def test_importing_and_asking_for_a_logger_configures_nothing():
    assert get_logger("revjax.data.corpus") is logging.getLogger("revjax.data.corpus")
    assert get_logger("data") is logging.getLogger("revjax.data")
    assert not get_logger("data").handlers


def test_text_outside_a_terminal_is_plain_lines():
    out = logged()
    get_logger("data").warning("left out %d files", 3)
    assert out.getvalue().endswith("WARNING left out 3 files\n") and "\x1b" not in out.getvalue()


def test_json_lines_parse_and_keep_fields_as_numbers():
    out = logged("json")
    get_logger().info("step", extra={"loss": np.float32(0.5), "step": 3})
    try:
        raise ValueError("bad")
    except ValueError:
        get_logger().exception("failed")
    first, second = map(json.loads, out.getvalue().splitlines())
    assert (first["message"], first["level"], first["loss"], first["step"]) == ("step", "info", 0.5, 3)
    assert "ValueError: bad" in second["exception"]


def test_setup_again_replaces_and_level_filters():
    first, second = logged(), logged(level="warning")
    get_logger().info("quiet")
    get_logger().warning("loud")
    assert first.getvalue() == "" and "loud" in second.getvalue() and "quiet" not in second.getvalue()


@pytest.mark.parametrize("arguments, message", [(("loud",), "level must be"), (("info", "xml"), "format must be")])
def test_a_wrong_level_or_format_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        setup(*arguments)


def test_progress_outside_a_terminal_writes_every_tenth_and_the_end():
    out, now = logged(), itertools.count(0, 0.01)
    with Progress(1000, "train", every_s=1e9, clock=lambda: next(now)) as progress:
        for step in range(1000):
            progress.update(1, loss=2.5 - step / 1000, tokens_per_s=41_000)
    lines = out.getvalue().splitlines()
    assert len(lines) == 11  # the first update, every tenth after it, the end
    assert "train 1/1000 loss 2.5000  tokens/s 41,000" in lines[0]
    assert "train 1000/1000 loss 1.5010" in lines[-1]


def test_progress_writes_when_time_has_passed():
    out, now = logged(), [0.0]
    with Progress(10_000, "train", every_s=10, clock=lambda: now[0]) as progress:
        for _ in range(30):
            now[0] += 1.0
            progress.update()
    assert [line.split()[4] for line in out.getvalue().splitlines()] == [f"{n}/10000" for n in (1, 11, 21, 30)]


def test_progress_in_json_has_fields():
    out = logged("json")
    with Progress(1, "eval") as progress:
        progress.update(1, loss=2.5, canary=0, name="a")
    entry = json.loads(out.getvalue().splitlines()[0])
    assert (entry["done"], entry["total"], entry["loss"], entry["canary"], entry["name_"]) == (1, 1, 2.5, 0, "a")


def test_progress_in_a_terminal_is_a_bar_below_the_log():
    out = logged(stream=Terminal())
    with Progress(2, "train") as progress:
        progress.update(1, loss=2.5)
        get_logger().info("saved step 1")
        progress.update(1, loss=2.25)
    assert "saved step" in out.getvalue() and "2/2" in out.getvalue() and "loss 2.2500" in out.getvalue()


def test_numbers_of_progress_have_the_same_decimals_in_every_line():
    out, now = logged(), itertools.count()
    with Progress(3, "train", clock=lambda: next(now)) as progress:
        for loss in (1.5, 2.0, np.float32(0.996891)):
            progress.update(1, loss=loss, rate=3e-4, canary=np.int32(0), tokens=12_345)
    shown = [line.partition("/3 ")[2] for line in out.getvalue().splitlines()]
    assert [line[:11] for line in shown] == ["loss 1.5000", "loss 2.0000", "loss 0.9969"]
    assert all("rate 3.000e-04  canary 0  tokens 12,345" in line for line in shown)


def test_progress_tells_how_long_the_rest_takes_once_there_is_a_speed():
    out, now = logged(), [0.0]
    with Progress(1000, "train", every_s=10, clock=lambda: now[0]) as progress:
        progress.update(0)  # a run begins, and compiles
        for seconds, n in ((100, 1), (10, 5), (10, 5), (10, 989)):
            now[0] += seconds
            progress.update(n)
    assert [line.partition("/1000")[2] for line in out.getvalue().splitlines()] == [
        "",
        "",
        "  0:33:08 left",
        "  0:32:58 left",
        "",
    ]


def test_progress_writes_no_more_than_a_line_a_second_and_tells_time_by_the_recent_speed():
    out, now = logged(), [0.0]
    with Progress(400, "train", every_s=10, clock=lambda: now[0]) as progress:
        for i in range(400):
            now[0] += 1e-3 if i < 200 else 0.1
            progress.update()
    lines = [line.partition("train ")[2].strip() for line in out.getvalue().splitlines()]
    assert [line.split("/")[0] for line in lines] == ["1", "209", "249", "289", "329", "369", "400"]
    assert lines[3].endswith("0:00:11 left")  # 111 more at 0.1 s
