from __future__ import annotations

import pytest

from flows import training_display as module
from flows.console import Console
from flows.training_display import TrainingDisplay, training_display
from model.loop import Position


def test_all_seeds_share_one_count_and_the_text_has_epoch_and_loss() -> None:
    shown: list[tuple[float, str]] = []
    display = TrainingDisplay((7, 3), 10, lambda done, text: shown.append((done, text)))
    display.on_step(Position(7, 2, 10, 5, 10, 0.61))
    display.on_epoch(3, {"epoch": 4.0, "train_loss": 0.5, "val_macro_f1": 0.9})
    display.on_epoch(3, {"epoch": 5.0, "train_loss": 0.4, "val_macro_f1": float("nan")})
    assert [done for done, _ in shown] == pytest.approx([1.5, 14, 15])
    assert shown[0][1] == "seed 7, epoch 2, loss 0.610"
    assert shown[1][1] == "seed 3, epoch 4, loss 0.500, validation macro F1 0.900"
    assert shown[2][1] == "seed 3, epoch 5, loss 0.400"


def test_lines_say_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now_s = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s)
    with training_display(Console(), (0, 1), 10) as display:
        for epoch in range(1, 5):
            now_s += 10.0
            display.on_epoch(0, {"epoch": float(epoch), "train_loss": 0.5, "val_macro_f1": 0.9})
    lines = capsys.readouterr().err.splitlines()
    # 10 s an epoch, one line every 15 s at most, 18 and 16 of 20 epochs left.
    assert len(lines) == 2
    assert "epoch 2, loss 0.500" in lines[0]
    assert "about 180 s left" in lines[0]
    assert "about 160 s left" in lines[1]


def test_a_quiet_console_is_told_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "_LINE_INTERVAL_S", 0.0)
    with training_display(Console(quiet=True), (0,), 2) as display:
        display.on_epoch(0, {"epoch": 1.0, "train_loss": 0.5, "val_macro_f1": 0.9})
    assert capsys.readouterr().err == ""
