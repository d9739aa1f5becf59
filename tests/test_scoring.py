"""The score table, and the first step of a round: scoring and training must say the same of the same policy."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_models import PLAIN, loud_params, mesh_of, random_rows, reference_token_logps
from toy_training import MODEL, SETTINGS, TPAW, built, fresh_params, one_device, spin, table

from selfplay_jax import scoring
from selfplay_jax.errors import Stopped
from selfplay_jax.groups import TARGET
from selfplay_jax.methods import METHODS, plan
from selfplay_jax.rounds import RoundFiles
from selfplay_jax.scoring import ScoreTable, score

COUNT = 11


@pytest.fixture(scope="module")
def rows():
    """Prompts of clearly different lengths, three responses each, an empty one among them."""
    rng = np.random.default_rng(0)
    prompts = random_rows(rng, rng.integers(1, 9, COUNT).tolist())
    responses = [random_rows(rng, rng.integers(1, 9, 3).tolist()) for _ in range(COUNT)]
    responses[4][1] = []
    return prompts, responses


def reference(prompts, responses) -> np.ndarray:
    params = loud_params(MODEL, 0)
    return np.array(
        [
            [reference_token_logps(PLAIN, params, p, z).sum() for z in zs]
            for p, zs in zip(prompts, responses, strict=True)
        ]
    )


def test_score_is_the_log_probability_row_by_row(rows):
    """Eleven rows in batches of four: the last has a filler row, and the order by length is undone."""
    found = score(MODEL, fresh_params(), *rows, mesh=one_device(), batch_size=4)
    assert found.shape == (COUNT, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found, reference(*rows), rtol=1e-5, atol=1e-4)
    assert found[4, 1] == 0.0
    order = np.random.default_rng(1).permutation(COUNT)
    shuffled = score(
        MODEL, fresh_params(), [rows[0][i] for i in order], [rows[1][i] for i in order], mesh=one_device(), batch_size=4
    )
    np.testing.assert_array_equal(shuffled, found[order])


@pytest.mark.parametrize("shape", [(4, 2), (2, 2, 2)], ids=str)
def test_score_on_a_mesh_rounds_the_batch_up_to_the_devices(rows, shape):
    mesh = mesh_of(*shape)
    found = score(MODEL, fresh_params(mesh), *rows, mesh=mesh, batch_size=3)
    np.testing.assert_allclose(found, reference(*rows), rtol=1e-5, atol=1e-4)


def test_many_columns_are_scored_in_turns(rows, monkeypatch):
    whole = score(MODEL, fresh_params(), *rows, mesh=one_device(), batch_size=4)
    monkeypatch.setattr(scoring, "_MOST_COLUMNS", 2)
    seen = []
    pack = scoring.pack
    monkeypatch.setattr(scoring, "pack", lambda p, z: seen.append(len(z[0])) or pack(p, z))
    found = score(MODEL, fresh_params(), *rows, mesh=one_device(), batch_size=4)
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)
    assert seen == [2, 1] * 3


def fake_score(calls):
    """A stand-in for the forward pass: a number that tells player, prompt and response apart."""

    def score(model, params, prompts, responses, *, mesh, batch_size):
        calls.append((params, len(prompts)))
        return np.array([[params + 10 * p[0] + z[0] / 8 for z in zs] for p, zs in zip(prompts, responses, strict=True)])

    return score


def fill(scores, player, responses, count=5, stop_after=99, chunk=2, progress=None):
    """Fills cells; after `stop_after` chunks a stop is asked for."""
    asked = iter([False] * stop_after + [True])

    def check_stop():
        if next(asked):
            raise Stopped

    scores.fill(
        player, responses, [[n] for n in range(count)], model=MODEL, params=player, mesh=None, batch_size=4,
        chunk=chunk, check_stop=check_stop, on_progress=[].append if progress is None else progress.append,
    )  # fmt: skip


def answers(source: int, count: int = 5, samples: int = 2):
    width = 1 if source == TARGET else samples
    return [[[8 * (source + 2) + s] for s in range(width)] for _ in range(count)]


def expected(player: int, source: int, count: int = 5, samples: int = 2) -> np.ndarray:
    width = 1 if source == TARGET else samples
    return np.array([[player + 10 * n + (source + 2) + s / 8 for s in range(width)] for n in range(count)])


def files_of(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_the_cells_of_one_pass_lie_in_one_file(tmp_path, monkeypatch):
    calls, progress = [], []
    monkeypatch.setattr(scoring, "score", fake_score(calls))
    scores = ScoreTable(tmp_path)
    assert scores.missing((1,), (TARGET, 1, 0)) == {1: [TARGET, 1, 0]}
    fill(scores, 1, {s: answers(s) for s in (TARGET, 1, 0)}, progress=progress)
    assert list(files_of(tmp_path)) == ["rounds/001/scores/player_001.npz"]
    assert [p.name for p in RoundFiles(tmp_path, 1).score_path(1).parent.iterdir()] == ["player_001.npz"]
    assert calls == [(1, 2), (1, 2), (1, 1)] and progress == [2, 2, 1]
    for source in (TARGET, 0, 1):
        np.testing.assert_array_equal(scores.read(1, source), expected(1, source))
    assert scores.missing((1,), (TARGET, 1, 0)) == {}
    assert scores.missing((1, 0), (TARGET, 2)) == {1: [2], 0: [TARGET, 2]}


def test_a_stopped_pass_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(scoring, "score", fake_score(calls))
    responses = {s: answers(s) for s in (TARGET, 0)}
    fill(ScoreTable(tmp_path / "whole"), 0, responses)
    whole, interrupted = list(calls), tmp_path / "interrupted"
    calls.clear()
    for stop_after in (0, 1, 0, 1):
        with pytest.raises(Stopped):
            fill(ScoreTable(interrupted), 0, responses, stop_after=stop_after)
        assert ScoreTable(interrupted).missing((0,), (TARGET, 0)) == {0: [TARGET, 0]}
    fill(ScoreTable(interrupted), 0, responses)
    assert calls == whole  # every chunk once
    assert files_of(interrupted) == files_of(tmp_path / "whole")


FIELDS = {
    "spin": {"lam": 0.1, "kind": "logistic", "mix_previous": True},
    "tspin": {"alpha": 1.0, "beta": 0.1, "kind": "logistic", "reference": True},
    "tpaw": TPAW,
}


@pytest.mark.parametrize("method", sorted(FIELDS))
@pytest.mark.parametrize("window", [1, 2, 3])
def test_every_cell_is_computed_once_ever_whatever_the_method(tmp_path, monkeypatch, method, window):
    monkeypatch.setattr(scoring, "score", fake_score([]))
    assert METHODS[method].players(FIELDS[method], 0, window)
    computed = []
    for t in range(6):
        row, scores = plan(method, FIELDS[method], round_index=t, window=window), ScoreTable(tmp_path)
        sources = (TARGET, *row.opponents)
        for player, wanted in scores.missing(row.players, sources).items():
            fill(scores, player, {s: answers(s) for s in wanted}, chunk=9)
            computed += [(player, s) for s in wanted]
        assert scores.missing(row.players, sources) == {}
        for player, source in computed:  # no later pass has overwritten what an earlier one wrote
            np.testing.assert_array_equal(scores.read(player, source), expected(player, source))
    assert len(computed) == len(set(computed))
    if method == "tpaw" and window == 3:  # the steady state of DESIGN.md: 4 cells of θ_t, one of each older player
        assert computed[-6:] == [(5, TARGET), (5, 5), (5, 4), (5, 3), (4, 5), (3, 5)]


# The first step of a round. Scoring runs in other batches and beside other responses than training.


def first_step(objective, players: int, opponents: int, rounding: float = 0.0):
    """Scores a table with the policy itself, then takes the round's first step; older players are worse ones."""
    data = table(8, opponents=opponents, players=players)
    columns = [[[y], *[zs[n] for zs in data.opponents]] for n, y in enumerate(data.targets)]
    flat = [[z for column in row for z in column] for row in columns]
    now = score(MODEL, fresh_params(), data.prompts, flat, mesh=one_device(), batch_size=3)
    now *= np.float32(1 + rounding)
    old = np.stack([now - j for j in range(players)])  # players that found everything less likely: P_j > 0
    split = np.split(old, np.cumsum([1] + [2] * opponents)[:-1], axis=-1)
    data = dataclasses.replace(data, players=split)
    parts = built(objective, SETTINGS)
    batch = data.batch(np.array([5, 2, 7, 0, 3, 1]), size=8, epoch=0, per_round=1)
    state = parts.init(fresh_params())
    _, metrics = parts.step(state, {}, jax.device_put(batch, parts.rows), np.float32(1e-2))
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("rounding", [0.0, -1e-7, 1e-7])  # what another program, device or mesh may make of it
def test_tpaw_boosts_every_target_at_the_first_step_of_round_0(rounding):
    metrics = first_step(plan("tpaw", {**TPAW, "lam": 1.0}, round_index=0, window=3).objective, 1, 1, rounding)
    assert metrics["alpha"] == 6.0 and metrics["boosted"] == 1.0
    assert metrics["reward_target"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["reward_generated"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["loss"] == pytest.approx(np.log(2), abs=1e-4)


def test_tpaw_boosts_for_the_newest_player_alone_when_the_older_ones_were_worse():
    metrics = first_step(plan("tpaw", {**TPAW, "lam": 1.0}, round_index=2, window=3).objective, 3, 3)
    assert metrics["boosted"] == pytest.approx(1 / 3, rel=1e-6)
    assert metrics["alpha"] == pytest.approx((6 + 1 + 1) / 3, rel=1e-6)
    for j in range(3):
        assert metrics[f"reward_target_{j}"] == pytest.approx(j, abs=1e-5)
        assert metrics[f"reward_generated_{j}"] == pytest.approx(j, abs=1e-5)


def test_the_first_loss_of_spin_is_log_2():
    metrics = first_step(spin(round_index=1), 1, 2)
    assert metrics["loss"] == pytest.approx(np.log(2), abs=1e-5)
    for name in ("reward_target", "reward_generated", "margin"):
        assert metrics[name] == pytest.approx(0.0, abs=1e-5)
    assert metrics["grad_norm"] > 1e-3
