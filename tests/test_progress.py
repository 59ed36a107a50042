"""Progress without a terminal: lines at the right times."""

import io

import pytest
from rich.console import Console

from openmythos.cli.progress import Progress, counted


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """A Progress with a fake clock, and the lines that it printed."""

    def __init__(self, stage: str, **options: object) -> None:
        self.clock, self._file = Clock(), io.StringIO()
        console = Console(file=self._file, highlight=False, markup=False)
        self.progress = Progress(console, stage, clock=self.clock, **options)  # type: ignore[arg-type]

    def after(self, seconds: float) -> Progress:
        self.clock.now += seconds
        return self.progress

    def lines(self) -> list[str]:
        found = self._file.getvalue().splitlines()
        self._file.seek(0)
        self._file.truncate()
        return found


def test_the_first_update_is_printed_at_once() -> None:
    screen = Screen("training", total=200)
    screen.after(4).update(1, "loss 5.000, 100 tokens/s")
    assert screen.lines() == ["training: step 1 of 200, loss 5.000, 100 tokens/s, 4 s"]
    screen.after(10).update(3, "loss 4.500, 100 tokens/s")
    # Two steps took 10 s, 197 are left; the start does not count for the rate.
    expected = "training: step 3 of 200, loss 4.500, 100 tokens/s, 14 s, ETA 16 min"
    assert screen.lines() == [expected]


def test_lines_come_every_twentieth_and_every_ten_seconds_but_never_in_a_flood() -> None:
    screen = Screen("training", total=100)
    for step in range(1, 101):
        screen.after(2).update(step)
    steps = [int(line.split()[2]) for line in screen.lines()]
    assert steps == [1, *range(5, 101, 5)]
    fast = Screen("training", total=100)
    for step in range(1, 101):
        fast.after(0.05).update(step)
    assert len(fast.lines()) <= 7  # five seconds
    slow = Screen("training", total=10_000)
    for step in range(1, 61):
        slow.after(1).update(step)
    assert [line.split()[2] for line in slow.lines()] == ["1", "11", "21", "31", "41", "51"]


def test_silence_is_broken_every_ten_seconds() -> None:
    screen = Screen("training", total=9)
    for _ in range(12):
        screen.after(1).tick()
    assert screen.lines() == ["training: starting, 10 s"]
    screen.after(1).update(3, "loss 5.0")
    screen.lines()
    for _ in range(21):
        screen.after(1).tick()
    assert screen.lines() == [
        "training: step 3 of 9, loss 5.0, 23 s; still running, no news for 10 s",
        "training: step 3 of 9, loss 5.0, 33 s; still running, no news for 20 s",
    ]


def test_work_that_goes_on_between_two_lines_is_no_silence() -> None:
    screen = Screen("training", total=10_000)
    for step in range(1, 15):
        screen.after(0.8).update(step)
        screen.after(0.1).tick()
    lines = screen.lines()
    assert [line.split()[2] for line in lines] == ["1", "13"] and "no news" not in str(lines)


def test_a_new_stage_restarts_time_and_kept_work_does_not_count_for_the_rate() -> None:
    screen = Screen("reading", unit="MB")
    screen.after(1).update(2_500_000)
    screen.after(1).update(100_000, stage="tokens", total=400_000)
    assert screen.lines() == ["reading: 2.5 MB, 1 s", "tokens: 0.1 of 0.4 MB, 0 s"]
    screen = Screen("preparing", unit="MB")
    screen.after(10).update(6_000_000, "1.00 MB/s", total=8_000_000, kept=4_000_000)
    assert screen.lines() == ["preparing: 6.0 of 8.0 MB, 1.00 MB/s, 10 s, ETA 10 s"]


def test_texts_pass_unchanged_and_are_counted() -> None:
    screen = Screen("reading the corpus", unit="MB")
    texts = ["a" * 600_000, "b" * 900_000]
    assert list(counted(iter(texts), screen.progress)) == texts
    assert screen.lines() == [
        "reading the corpus: 0.6 MB, 0 s",
        "training the tokenizer: 1.5 MB, 0 s",
    ]


def test_a_terminal_gets_a_bar() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    with Progress(console, "training", total=4) as progress:
        progress.update(2, "loss 1.000")
    assert "training" in file.getvalue() and "step 2 of 4" in file.getvalue()
    assert "ETA" in file.getvalue() and "loss 1.000" in file.getvalue()


def test_the_heart_beats_and_ends_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen("training")
    ticks: list[float] = []
    monkeypatch.setattr(screen.progress, "tick", lambda: ticks.append(1))
    monkeypatch.setattr("openmythos.cli.progress.BEAT", 0.01)
    with screen.progress:
        while len(ticks) < 3:
            pass
    assert not screen.progress._heart.is_alive()
