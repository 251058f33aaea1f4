"""How much of a prompt is read beside others, from how long steps have taken."""

from __future__ import annotations

import pytest
import torch

from groundup.inference import Engine, EngineSettings, Request, SamplingParams
from groundup.inference.scheduler import FEWEST_READ, FIRST_READ, PATIENCE, REFRESH, SHARE, Pace
from groundup.model import ModelConfig, Transformer


def run(pace: Pace, steps: int, own: float, each: float, continued: int = 4) -> tuple[list[int], list[float]]:
    """Steps on a machine where one takes ``own`` seconds, and each token that is read ``each`` more."""
    reads, seconds = [], []
    for _ in range(steps):
        reads.append(pace.reading(continued))
        seconds.append(own + each * reads[-1])
        pace.note(continued, reads[-1], seconds[-1])
    return reads, seconds


def before(pace: Pace, own: float, continued: int = 4) -> None:
    for _ in range(30):
        pace.note(continued, 0, own)


def test_alone_a_prompt_has_the_whole_step() -> None:
    pace = Pace(512)
    assert pace.reading(0) == 512
    pace.note(0, 512, 1.0)
    assert pace.reading(0) == 512


def test_steps_take_no_longer_than_patience_has_it() -> None:
    pace = Pace(512)
    before(pace, 0.010)
    reads, seconds = run(pace, 60, 0.010, 0.001)
    assert reads[0] == FIRST_READ
    assert max(seconds[20:]) <= PATIENCE * 0.010 * 1.001
    assert sum(reads[20:]) / 40 > 10
    assert reads.count(0) == 60 // (REFRESH + 1)


def test_what_is_usual_does_not_grow_while_texts_do() -> None:
    pace = Pace(512)
    before(pace, 0.010)
    run(pace, 60, 0.010, 0.001)
    reads, seconds = run(pace, 400, 0.018, 0.001)
    assert max(seconds[-100:]) <= 0.018 * (1 + SHARE) * 1.001
    assert reads[-1] == int(SHARE * 0.018 / 0.001 + 1e-9) or reads[-1] == 0
    before(pace, 0.018)  # nobody reads: that is what they are used to now
    assert max(run(pace, 40, 0.018, 0.001)[0]) > 20


def test_more_that_are_continued_have_a_usual_of_their_own() -> None:
    pace = Pace(512)
    before(pace, 0.010)
    run(pace, 40, 0.010, 0.001)
    reads, _ = run(pace, 200, 0.040, 0.001, continued=20)
    assert max(reads[-40:]) >= 45


def test_however_slow_a_token_is_the_prompt_comes_to_an_end() -> None:
    pace = Pace(512)
    before(pace, 0.010)
    reads, _ = run(pace, 60, 0.010, 1.0)
    assert set(reads[1:]) == {0, FEWEST_READ}


def test_never_more_than_a_step_holds() -> None:
    pace = Pace(16)
    assert pace.reading(1) == 16
    before(pace, 0.010)
    assert max(run(pace, 50, 0.010, 1e-9)[0]) == 16


@pytest.mark.parametrize("live", [True, False])
def test_only_those_whom_somebody_watches_are_not_held_up(live: bool) -> None:
    torch.manual_seed(1)
    sizes = dict(vocab_size=61, context_length=200, n_layer=1, n_head=2, n_embd=12, n_ff=17)
    model = Transformer(ModelConfig.from_dict(sizes)).eval()
    engine = Engine(model, settings=EngineSettings(step_tokens=64))
    greedy = SamplingParams(temperature=0.0, max_tokens=40, ignore_end=True)
    engine.add(Request([5], greedy, live=live))
    for _ in range(3):
        engine.step()
    pace = engine.scheduler.pace
    pace.step = pace.usual = 0.001
    pace.token = 1.0
    engine.add(Request([7] * 100, greedy))
    engine.step()
    (text,) = [text for text in engine.scheduler.running if len(text.tokens) >= 100]
    assert text.computed == (FEWEST_READ if live else 63)
