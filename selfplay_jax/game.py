"""What stays the same through a run: its config, data, model, mesh and files, checked before anything is computed."""

import dataclasses
import json
import pathlib
import uuid
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from selfplay_jax import config as configs
from selfplay_jax import distributed, evaluation, layout, metrics, partitioning
from selfplay_jax.checkpoints import Checkpoints, abstract_like
from selfplay_jax.data import builtin, tasks
from selfplay_jax.data.templates import Template, check_vocabulary, load_tokenizer
from selfplay_jax.errors import UserError
from selfplay_jax.methods import check_fields, needs_rejected
from selfplay_jax.models import Model, hf_directory, load_hf, lora, read_config, save_hf, splash
from selfplay_jax.models.decoder import Params
from selfplay_jax.progress import say
from selfplay_jax.rounds import wait_for, write_bytes
from selfplay_jax.scoring import ScoreTable


@dataclasses.dataclass(frozen=True)
class Game:
    """A run. `base` is what is never trained: {} without LoRA, else all parameters but the adapters.

    Every process of a job has one, and calls its methods at the same points.
    """

    config: Any
    workdir: epath.Path
    model: Model
    source: str  # the Hugging Face directory or hub name that the model came from
    base: Params
    template: Template
    task: tasks.Task
    mesh: Mesh
    checkpoints: Checkpoints
    scores: ScoreTable
    stop: distributed.Stop

    @property
    def shardings(self) -> Params:
        """Where parameters lie for training and scoring."""
        return self.model.shardings(self.mesh)

    def brought(self) -> Params:
        """The parameters that the user brought, with new adapters (that change nothing yet) under LoRA."""
        if self.model.lora is None:
            return load_hf(self.source, param_dtype=self.model.param_dtype, shardings=self.shardings)[1]
        shardings = self.model.split(self.shardings)[0]
        adapters = jax.jit(lambda key: self.model.split(self.model.init(key))[0], out_shardings=shardings)
        return self.model.join(adapters(jax.random.key(self.config.seed)), self.base)

    def player(self, index: int) -> Params:
        """θ_index, straight from Orbax into the training layout."""
        trained = self.model.split(abstract_like(self.model.abstract_params(), self.shardings))[0]
        return self.model.join(self.checkpoints.load_player(index, trained), self.base)

    def save_player(self, index: int, params: Params, score: float | None) -> None:
        """Commits θ_index: what is trained of it."""
        self.checkpoints.save_player(index, self.model.split(params)[0], score=score)

    def for_decoding(self, params: Params) -> tuple[Model, Params, Mesh]:
        """The same policy for decoding: adapters merged, in the compute dtype, laid out once instead of gathered at
        every token.

        Of several processes each gets it on a mesh of its own devices, to sample without the others, unless
        `sampling.sharded_weights` or the tensor axis needs them.
        """
        model, params = lora.merge(self.model, params)
        if self.config.sampling.sharded_weights:
            return model, params, self.mesh
        model, params = model.in_compute_dtype(params)
        shardings = model.shardings(self.mesh, partitioning.DECODE_RULES)
        mesh = distributed.local_mesh(self.mesh)
        return model, distributed.localise(distributed.place(params, shardings), mesh), mesh

    def exported(self, name: str) -> bool:
        """Whether WORKDIR/hf/NAME is there, whole."""
        last = lora.ADAPTER_CONFIG if self._exports_adapters else hf_directory.CONFIG
        return distributed.agree((self.workdir / "hf" / name / last).exists)

    def export(self, params: Params, name: str) -> epath.Path:
        """Writes WORKDIR/hf/NAME: a model directory, or under LoRA with `lora.export=peft` the adapters alone."""
        path = self.workdir / "hf" / name
        if self._exports_adapters:
            local = pathlib.Path(self.source).expanduser()
            lora.save_peft(path, self.model, params, base=str(local.resolve()) if local.is_dir() else self.source)
        else:
            model, params = lora.merge(self.model, params)
            # With the template that it was trained with, so that whoever opens the directory asks in the same form.
            dtype, template = self.config.export_dtype or None, self.template.jinja
            save_hf(path, model, params, source=self.source, dtype=dtype, chat_template=template)
        return path

    @property
    def _exports_adapters(self) -> bool:
        return self.model.lora is not None and self.config.lora.export == "peft"


def claim(workdir: epath.Path, config: Any) -> None:
    """Records the config in a new workdir; in an old one, checks that it is the same run."""

    def try_it() -> None:
        try:
            _claim(workdir, config)
        except OSError as error:
            raise UserError(f"the workdir {workdir} cannot be used: {error.strerror or error}.") from error

    distributed.agree(try_it)
    _check_shared(workdir)


def _check_shared(workdir: epath.Path) -> None:
    """Checks that all processes see one workdir: each host's own disk would split the run."""
    if distributed.count() == 1:
        return
    token = workdir / f".seen_{distributed.agree(lambda: uuid.uuid4().hex)}"
    distributed.agree(lambda: write_bytes(token, b""))
    wait_for(token)
    distributed.barrier("seen")
    distributed.agree(token.unlink)


def _claim(workdir: epath.Path, config: Any) -> None:
    path = workdir / "config.json"
    if path.exists():
        difference = configs.difference(metrics.read_json(path), config)
        if difference and (workdir / "data.json").exists():  # else the run stopped before it began: at its data, say
            raise UserError(
                f"{workdir} holds a run with another config: {difference}. Take another --workdir, or the old value."
            )
    elif workdir.exists() and any(not p.name.startswith(("config.json.partial-", ".seen_")) for p in workdir.iterdir()):
        raise UserError(f"{workdir} is not empty and holds no run (no config.json): take another --workdir.")
    workdir.mkdir(parents=True, exist_ok=True)
    metrics.write_json(path, json.loads(config.to_json()))


def check(config: Any) -> None:
    """Raises a UserError for the first field that cannot work, without reading model or data."""
    configs.check(config)
    for t in range(max(config.rounds, 1)):
        check_fields(config.method, configs.of_round(config, t).loss)
    evaluation.parse(config.evaluation.run)
    evaluation.Answers(config.evaluation.answer)
    if config.export == "best" and not (config.data.validation_examples and config.evaluation.every):
        raise UserError(
            "config.export=best ranks checkpoints on validation examples: config.data.validation_examples and "
            "config.evaluation.every must be at least 1."
        )
    lora.of_config(config.lora)


def set_up(config: Any, workdir: epath.Path, stop: distributed.Stop) -> Game:
    """Reads tokenizer, data and the model's configuration; of its weights only what is never trained."""
    mesh = partitioning.make_mesh(config.mesh.fsdp, config.mesh.tensor, replica=config.mesh.replica)
    path = str(builtin.BASE) if config.model.path == "builtin" else config.model.path
    fields = {name: value for name, value in config.model.items() if name != "path"}
    fields["attention"] = splash.resolve(fields["attention"], partitioning.platform(mesh))
    model = Model(read_config(path), **fields, lora=lora.of_config(config.lora))
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, model.config.vocab_size)
    template = Template.from_tokenizer(tokenizer, config.data.template, stop_ids=model.config.stop_ids)
    task = _load_task(config, workdir, template)
    if needs_rejected(config.method, config.loss) and any(record.rejected is None for record in task.train):
        raise UserError(
            f"config.method={config.method} compares with dispreferred answers, and {config.data.source} has none: "
            "take preference data (columns prompt, chosen, rejected), or name the column in config.data.columns."
        )
    evaluation.check(config.evaluation.run, config.evaluation.lm_eval_path)
    _tell(config, model, template, task)
    for note in layout.notes(config, model, mesh):
        say(f"note: {note}")
    base: Params = {}
    if model.lora is not None:
        shardings = model.split(model.shardings(mesh))[1]
        base = load_hf(path, param_dtype=model.param_dtype, shardings=shardings)[1]
    checkpoints = Checkpoints(workdir / "checkpoints", window=config.window)
    return Game(config, workdir, model, path, base, template, task, mesh, checkpoints, ScoreTable(workdir), stop)


def _load_task(config: Any, workdir: epath.Path, template: Template) -> tasks.Task:
    """Reads the data, writes down what they are, and checks that they still are what the run began with."""
    task = tasks.load(config.data, template, config.seed)
    about, listed = workdir / "data.json", workdir / "bad_records.jsonl"
    read = distributed.gather(task.identity)
    differs = [process for process, identity in enumerate(read) if identity != read[0]]
    if differs:
        raise UserError(
            f"process {differs[0]} reads other data, template or tokenizer than process 0: give all hosts the same "
            "config.data.source and config.model.path."
        )

    def record() -> None:
        if about.exists():
            tasks.check_same(metrics.read_json(about), task, workdir)
        metrics.write_json(about, task.describe())
        if task.bad:
            lines = (json.dumps(dataclasses.asdict(bad), ensure_ascii=False) + "\n" for bad in task.bad)
            write_bytes(listed, "".join(lines).encode("utf-8", "backslashreplace"))
            say(f"{len(task.bad)} bad records skipped, listed in {listed}")

    distributed.agree(record)
    return task


def _tell(config: Any, model: Model, template: Template, task: tasks.Task) -> None:
    if model.attention == "splash_interpret":
        say("note: config.model.attention=splash is a kernel for TPUs; here it is interpreted, which is slow")
    if model.attention != "plain" and not splash.fits(model.config):
        say("note: attention is plain: splash attention has no form for a window in some of the model's layers only")
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
