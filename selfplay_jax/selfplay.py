"""The game: SFT, then rounds of sampling, scoring, training and evaluating. Reads as the papers' algorithm does.

Every phase first looks whether its result is on disk already, so the loop that starts a run is also the one that goes
on with it after any kill.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from selfplay_jax import config as configs
from selfplay_jax import metrics, partitioning, report
from selfplay_jax.checkpoints import Checkpoints, abstract_like
from selfplay_jax.data import builtin, tasks
from selfplay_jax.data.templates import Template, check_vocabulary, load_tokenizer
from selfplay_jax.errors import Stopped, UserError
from selfplay_jax.evaluation import evaluate
from selfplay_jax.methods import WARM_UP, check_fields, plan, samples_responses
from selfplay_jax.models import Model, load_hf, save_hf
from selfplay_jax.models.decoder import Params
from selfplay_jax.models.hf import read_config
from selfplay_jax.progress import progress, say
from selfplay_jax.rounds import TARGET, Responses, RoundFiles, write_bytes
from selfplay_jax.sampling.rollout import describe, rollout
from selfplay_jax.scoring import ScoreTable
from selfplay_jax.train import Settings, Table, summarise, train

SFT = -1  # the warm-up's round index


@dataclasses.dataclass(frozen=True)
class Game:
    """What stays the same through a run."""

    config: Any
    workdir: epath.Path
    model: Model
    source: epath.Path  # the Hugging Face directory that exports take tokenizer and template from
    template: Template
    task: tasks.Task
    mesh: Mesh
    checkpoints: Checkpoints
    scores: ScoreTable
    should_stop: Callable[[], bool]

    @property
    def shardings(self) -> Params:
        """Where parameters lie for training and scoring."""
        return partitioning.tree_shardings(self.model.logical_axes(), self.model.abstract_params(), self.mesh)

    def player(self, index: int) -> Params:
        """θ_index, straight from Orbax into the training layout."""
        return self.checkpoints.load_player(index, abstract_like(self.model.abstract_params(), self.shardings))

    def for_decoding(self, params: Params) -> Params:
        """The same parameters laid out for decoding: moved once per round, not gathered at every token."""
        if self.config.sampling.sharded_weights:
            return params
        axes, rules = self.model.logical_axes(), partitioning.DECODE_RULES
        return jax.device_put(params, partitioning.tree_shardings(axes, params, self.mesh, rules))

    def check_stop(self) -> None:
        """Raises Stopped between two phases when asked to."""
        if self.should_stop():
            raise Stopped


def play(config: Any, workdir: epath.PathLike, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Plays the whole game of `config` in `workdir`, or what is left of it.

    Raises:
      UserError: see the phases; nothing finished before it is lost.
      Stopped: `should_stop()` said so; the same call goes on later.
    """
    configs.check(config)
    check_fields(config.method, config.loss)
    workdir = epath.Path(workdir)
    _claim(workdir, config)
    game = _set_up(config, workdir, should_stop)
    # Accelerators multiply float32 in fewer bits unless told not to; then scoring and training, which run in other
    # shapes, would differ by more than `tolerance`, and rounding would decide TPAW's α at θ = θ_t.
    exact = config.model.compute_dtype == "float32" and jax.default_backend() != "cpu"
    try:
        with jax.default_matmul_precision("highest" if exact else None):
            warm_up(game)
            for t in range(config.rounds):
                play_round(game, t)
        export(game)
        page = report.write_html(workdir)
    finally:
        game.checkpoints.close()
    say("")
    say(report.table(workdir))
    say(f"\nreport: {page}")


def _claim(workdir: epath.Path, config: Any) -> None:
    """Records the config in a new workdir; in an old one, checks that it is the same run."""
    path = workdir / "config.json"
    if path.exists():
        difference = configs.difference(metrics.read_json(path), config)
        if difference and (workdir / "data.json").exists():  # else the run stopped before it began: at its data, say
            raise UserError(
                f"{workdir} holds a run with another config: {difference}. Take another --workdir, or the old value."
            )
    elif workdir.exists() and any(not p.name.startswith("config.json.partial-") for p in workdir.iterdir()):
        raise UserError(f"{workdir} is not empty and holds no run (no config.json): take another --workdir.")
    workdir.mkdir(parents=True, exist_ok=True)
    metrics.write_json(path, json.loads(config.to_json()))


def _set_up(config: Any, workdir: epath.Path, should_stop: Callable[[], bool]) -> Game:
    """Reads tokenizer, data and the model's configuration; its weights are read when θ_0 is not there yet."""
    mesh = partitioning.make_mesh(config.mesh.fsdp, config.mesh.tensor)
    path = str(builtin.BASE) if config.model.path == "builtin" else config.model.path
    fields = {name: value for name, value in config.model.items() if name != "path"}
    model = Model(read_config(path), **fields)
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, model.config.vocab_size)
    template = Template.from_tokenizer(tokenizer, config.data.template, stop_ids=model.config.stop_ids)
    task = _load_task(config, workdir, template)
    checkpoints = Checkpoints(workdir / "checkpoints", window=config.window)
    scores = ScoreTable(workdir)
    game = Game(config, workdir, model, epath.Path(path), template, task, mesh, checkpoints, scores, should_stop)
    longest = config.data.max_prompt_tokens + max(config.data.max_response_tokens, config.sampling.max_new_tokens)
    if longest > model.config.max_position_embeddings:
        say(
            f"note: prompts and responses may reach {longest} tokens, the model was made for "
            f"{model.config.max_position_embeddings} (max_position_embeddings)"
        )
    say(
        f"{config.method} ({config.preset}): {len(task.train)} training, {len(task.validation)} validation and "
        f"{len(task.test)} test examples, template '{template.kind}'"
    )
    for name, counts in task.counts.items():
        lost = {key: value for key, value in counts.items() if key != "kept" and value}
        if lost:
            say(f"{name}: " + ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in lost.items()))
    return game


def _load_task(config: Any, workdir: epath.Path, template: Template) -> tasks.Task:
    """Reads the data, writes down what they are, and checks that they still are what the run began with."""
    task = tasks.load(config.data, template, config.seed)
    about, listed = workdir / "data.json", workdir / "bad_records.jsonl"
    if about.exists():
        tasks.check_same(metrics.read_json(about), task, workdir)
    metrics.write_json(about, task.describe())
    if task.bad:
        lines = (json.dumps(dataclasses.asdict(bad), ensure_ascii=False) + "\n" for bad in task.bad)
        write_bytes(listed, "".join(lines).encode("utf-8", "backslashreplace"))
        say(f"{len(task.bad)} bad records skipped, listed in {listed}")
    return task


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
    _, params = load_hf(game.source, param_dtype=game.model.param_dtype, shardings=game.shardings)
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
    files, clock, config = RoundFiles(game.workdir, t), Clock(), game.config
    if files.summary() is not None:
        return
    played = files.read("played.json")
    if played is not None and t + 1 in game.checkpoints.players():
        # Killed after θ_{t+1} was committed: θ_t may have left the window, and nothing is left to train.
        finish(game, files, clock, game.player(t + 1), index=t + 1, summary=played)
        return
    game.check_stop()
    row = plan(config.method, config.loss, round_index=t, window=config.window)
    records = game.task.train
    params = game.player(t)
    summary: dict[str, Any] = {"round": t, "method": config.method, "players": list(row.players)}
    answers: dict[int, Responses] = {}
    if samples_responses(config.method, config.loss):
        with clock.time("sample"):
            answers = {
                s: RoundFiles(game.workdir, s).load_responses([r.id for r in records]) for s in row.opponents if s != t
            }
            answers[t] = rollout(
                game.model, game.for_decoding(params), records, files, game.template, config.sampling,
                samples_per_prompt=config.samples_per_prompt, seed=config.seed, mesh=game.mesh,
                check_stop=game.check_stop,
            )  # fmt: skip
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
                check_stop=game.check_stop,
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
                result |= evaluate(
                    game.model, params, game.for_decoding(params), game.task.test, game.task.validation,
                    game.template, config, mesh=game.mesh, check_stop=game.check_stop,
                )  # fmt: skip
        files.write("evaluation.json", result)
    with clock.time("save"):
        if index not in game.checkpoints.players():
            score = result.get(f"validation_{config.evaluation.select}", result.get(config.evaluation.select))
            game.checkpoints.save_player(index, params, score=score)
        if config.export == "every":
            _export(game, params, f"theta_{index:03d}")
    summary |= {
        "preset": config.preset,
        "eval": result,
        "seconds": clock.seconds,
        **summarise(files.directory),
    }
    files.write("summary.json", summary)
    say(report.round_line(summary))


def export(game: Game) -> None:
    """Writes the Hugging Face directories that the run leaves: the last policy, or the best one."""
    wanted = {"final": game.config.rounds, "best": game.checkpoints.best()}.get(game.config.export)
    if wanted is None and game.config.export == "best":
        say("nothing is exported: config.export=best needs evaluated checkpoints (config.evaluation.every)")
    elif wanted is not None:
        path = _export(game, game.player(wanted), game.config.export)
        say(f"exported player {wanted} to {path}")


def _export(game: Game, params: Params, name: str) -> epath.Path:
    path = game.workdir / "hf" / name
    save_hf(path, game.model, params, source=game.source)
    return path


def _train(game: Game, params: Params, table: Table, objective: Any, settings: Settings, files: RoundFiles) -> Params:
    return train(
        game.model, params, table, objective, settings,
        mesh=game.mesh, seed=game.config.seed, round_index=files.round_index,
        opponents_per_prompt=game.config.opponents_per_prompt, checkpoints=game.checkpoints,
        directory=files.directory, should_stop=game.should_stop,
    )  # fmt: skip


def _settings(config: Any, **changed: Any) -> Settings:
    return Settings(**{**config.train.to_dict(), **changed})


def _usable(responses: Responses, cut_responses: str) -> Any:
    """Which responses may be trained on, bool [N, S]: "drop" leaves out those cut at the length limit."""
    return responses.finished if cut_responses == "drop" else np.ones_like(responses.finished)


def _player_scores(game: Game, players: tuple[int, ...], sources: list[int], count: int) -> list[np.ndarray]:
    """The score table's cells by source, float32 [J, N, S_source]; J = 0 for a method without players."""
    if not players:
        return [np.zeros((0, len(game.task.train), 1 if s == TARGET else count), np.float32) for s in sources]
    return [np.stack([game.scores.read(player, source) for player in players]) for source in sources]
