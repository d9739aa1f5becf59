"""The game: the loop over rounds, as in the papers: answer, score, train, evaluate; and where a killed run goes on."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from etils import epath

from selfplay_jax import distributed, metrics, report, stores
from selfplay_jax import game as games
from selfplay_jax.config import of_round
from selfplay_jax.evaluation import Subject, evaluate
from selfplay_jax.game import Game
from selfplay_jax.groups import REJECTED, TARGET
from selfplay_jax.methods import WARM_UP, Plan, plan
from selfplay_jax.models.decoder import Params
from selfplay_jax.progress import progress, say
from selfplay_jax.rounds import Responses, RoundFiles
from selfplay_jax.sampling.rollout import describe, rollout
from selfplay_jax.table import Table
from selfplay_jax.train import Settings, summarise, train

SFT = -1  # the warm-up's round index


def play(config: Any, workdir: epath.PathLike, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Plays the whole game of `config` in `workdir`, or what is left of it.

    Raises:
      UserError: see the phases; nothing finished before it is lost.
      Stopped: `should_stop()` said so; the same call goes on later.
    """
    games.check(config)
    stores.check_workdir(workdir)
    workdir = epath.Path(workdir)
    games.claim(workdir, config)
    game = games.set_up(config, workdir, distributed.Stop(should_stop))
    # Accelerators multiply float32 in fewer bits unless told not to; then scoring and training, which run in other
    # shapes, would differ by more than `tolerance`, and rounding would decide TPAW's α at θ = θ_t.
    exact = config.model.compute_dtype == "float32" and jax.default_backend() != "cpu"
    try:
        with jax.default_matmul_precision("highest" if exact else None):
            warm_up(game)
            for t in range(config.rounds):
                play_round(game, t)
        export(game)
        page, table = distributed.agree(lambda: (str(report.write_html(workdir)), report.table(workdir)))
    finally:
        game.checkpoints.close()
    say("")
    say(table)
    say(f"\nreport: {page}")


class Clock:
    """Seconds per phase of one round."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Adds the block's wall time to `phase`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


def warm_up(game: Game) -> None:
    """Makes θ_0: supervised fine-tuning of the brought model when asked for, else the brought model itself."""
    files, clock = RoundFiles(game.workdir, SFT), Clock()
    if files.summary() is not None:
        return
    task, config = game.task, game.config
    params = game.brought()
    if config.sft.epochs:
        no_players = _player_scores(game, (), [TARGET], 1)
        targets = Table([r.prompt for r in task.train], [r.target for r in task.train], [], [], no_players)
        settings = _settings(config, **config.sft.to_dict())
        objective = plan(WARM_UP, {}, round_index=0, window=1).objective
        with clock.time("train"):
            params = _train(game, params, targets, objective, settings, files)
    finish(game, files, clock, params, index=0, summary={"round": SFT, "method": WARM_UP})


def play_round(game: Game, t: int) -> None:
    """Round t: θ_t answers, the players judge, the policy is trained into θ_{t+1}."""
    files, clock, config = RoundFiles(game.workdir, t), Clock(), of_round(game.config, t)
    if files.summary() is not None:
        return
    played = files.read("played.json")
    if played is not None and t + 1 in game.checkpoints.players():
        # Killed after θ_{t+1} was committed: θ_t may have left the window, and nothing is left to train.
        finish(game, files, clock, game.player(t + 1), index=t + 1, summary=played)
        return
    game.stop.check()
    row = plan(config.method, config.loss, round_index=t, window=config.window)
    records = game.task.train
    params = game.player(t)
    summary: dict[str, Any] = {"round": t, "method": config.method, "players": list(row.players)}
    with clock.time("sample"):
        answers = _answers(game, row, params, config.sampling, files)
    if t in answers:
        summary["responses"] = describe(answers[t], records)
    with clock.time("score"):
        responses = {s: answers[s].tokens for s in row.opponents}
        summary["cells"] = judge(game, row.players, responses, known={t: params})
    table = Table(
        prompts=[record.prompt for record in records],
        targets=[record.target for record in records],
        opponents=[answers[s].tokens for s in row.opponents],
        usable=[_usable(answers[s], config.cut_responses) for s in row.opponents],
        players=_player_scores(game, row.players, [TARGET, *row.opponents], config.samples_per_prompt),
    )
    with clock.time("train"):
        params = _train(game, params, table, row.objective, _settings(config), files)
    files.write("played.json", summary)
    finish(game, files, clock, params, index=t + 1, summary=summary)


def _answers(game: Game, row: Plan, params: Params, settings: Any, files: RoundFiles) -> dict[int, Responses]:
    """The responses of every source that opposes: sampled by θ_t, read from earlier rounds, or brought by the data."""
    records, t = game.task.train, files.round_index
    answers: dict[int, Responses] = {}
    for source in row.opponents:
        if source == REJECTED:
            rejected = [record.rejected or [] for record in records]  # none is missing: game.set_up
            ended = np.array([[z[-1] in game.template.stop_ids] for z in rejected])
            answers[source] = Responses([[z] for z in rejected], ended, np.full(ended.shape, np.nan, np.float32))
        elif source == t:
            model, decode_params, mesh = game.for_decoding(params)
            answers[source] = rollout(
                model, decode_params, records, files, game.template, settings,
                samples_per_prompt=game.config.samples_per_prompt, seed=game.config.seed, mesh=mesh,
                check_stop=game.stop.check,
            )  # fmt: skip
        else:
            answers[source] = RoundFiles(game.workdir, source).load_responses([record.id for record in records])
    return answers


def judge(game: Game, players: tuple[int, ...], responses: dict[int, Any], known: dict[int, Params]) -> dict[str, int]:
    """Fills the cells of the score table that the round needs and that no round has filled; counts both kinds.

    `known` are players that are in memory; the others are restored one at a time.
    """
    records, config = game.task.train, game.config
    sources = [TARGET, *responses]
    columns = {TARGET: [[record.target] for record in records], **responses}
    missing = game.scores.missing(players, sources)
    for player, wanted in missing.items():
        with progress(f"scoring with player {player}", total=len(records), unit="prompts") as bar:
            game.scores.fill(
                player,
                {source: columns[source] for source in wanted},
                [record.prompt for record in records],
                model=game.model,
                params=known[player] if player in known else game.player(player),
                mesh=game.mesh,
                batch_size=config.scoring.batch_size,
                chunk=config.scoring.chunk,
                check_stop=game.stop.check,
                on_progress=bar.advance,
            )
    computed = sum(len(wanted) for wanted in missing.values())
    return {"computed": computed, "reused": len(players) * len(sources) - computed}


def finish(game: Game, files: RoundFiles, clock: Clock, params: Params, *, index: int, summary: dict[str, Any]) -> None:
    """Evaluates and commits θ_index, and writes the round's summary, its done marker."""
    config, result = game.config, files.read("evaluation.json")
    if result is None:
        result = {"theta": index}
        last = files.round_index == config.rounds - 1
        if config.evaluation.every and (index % config.evaluation.every == 0 or last):
            with clock.time("evaluate"):
                result |= evaluate(_subject(game, params, index), game.task.test, game.task.validation)
            distributed.agree(lambda: _log_evaluation(files, index, result))
        files.write("evaluation.json", result)
    with clock.time("save"):
        if index not in game.checkpoints.players():
            game.save_player(index, params, result.get(f"validation_{config.evaluation.select}"))
        if config.export == "every":
            game.export(params, f"theta_{index:03d}")
    summary |= {
        "preset": config.preset,
        "eval": result,
        "seconds": clock.seconds,
        **distributed.agree(lambda: summarise(files.directory)),
    }
    files.write("summary.json", summary)
    say(report.round_line(summary))


def _log_evaluation(files: RoundFiles, index: int, result: dict[str, Any]) -> None:
    """Adds θ_index's numbers to the round's metrics, once: a run killed before evaluation.json evaluates again."""
    if any(row["kind"] == "eval" for row in metrics.read(files.directory / "metrics.jsonl")):
        return
    with metrics.MetricsWriter(files.directory) as writer:
        writer.write({"kind": "eval", "round": files.round_index, "step": index, **result})


def export(game: Game) -> None:
    """Writes the Hugging Face directories that the run leaves: the last policy, or the best one."""
    if game.config.export == "every":  # of a run that was asked for less while it ran: what is still there
        for index in game.checkpoints.players():
            name = f"theta_{index:03d}"
            if not game.exported(name):
                say(f"exported player {index} to {game.export(game.player(index), name)}")
    wanted = {"final": game.config.rounds, "best": game.checkpoints.best()}.get(game.config.export)
    if wanted is not None:
        path = game.export(game.player(wanted), game.config.export)
        say(f"exported player {wanted} to {path}")


def _subject(game: Game, params: Params, index: int) -> Subject:
    decode_model, decode_params, decode_mesh = game.for_decoding(params)
    start = (lambda: game.player(0)) if index > 0 else None
    return Subject(
        game.model, params, decode_model, decode_params, start, game.template, game.mesh, game.config, game.task.train,
        game.stop.check, decode_mesh,
    )  # fmt: skip


def _train(game: Game, params: Params, table: Table, objective: Any, settings: Settings, files: RoundFiles) -> Params:
    return train(
        game.model, params, table, objective, settings,
        mesh=game.mesh, seed=game.config.seed, round_index=files.round_index,
        opponents_per_prompt=game.config.opponents_per_prompt, checkpoints=game.checkpoints,
        directory=files.directory, should_stop=game.stop.at_step,
    )  # fmt: skip


def _settings(config: Any, **changed: Any) -> Settings:
    return Settings(**{**config.train.to_dict(), **changed})


def _usable(responses: Responses, cut_responses: str) -> Any:
    """Which responses may be trained on, bool [N, S]: "drop" leaves out those cut at the length limit."""
    return responses.finished if cut_responses == "drop" else np.ones_like(responses.finished)


def _player_scores(game: Game, players: tuple[int, ...], sources: list[int], count: int) -> list[np.ndarray]:
    """The score table's cells by source, float32 [J, N, S_source]; J = 0 for a method without players."""
    if not players:
        return [np.zeros((0, len(game.task.train), 1 if s < 0 else count), np.float32) for s in sources]
    return [np.stack([game.scores.read(player, source) for player in players]) for source in sources]
