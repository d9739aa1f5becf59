"""The adapter to lm-evaluation-harness against the harness' rules in float64 NumPy, and against its `hf` backend."""

import dataclasses
import json
import subprocess
import sys

import harness_tasks as toy
import jax
import numpy as np
import pytest
from tiny_models import PLAIN, WINDOWED, loud_params, mesh_of, random_rows, reference_logits

from selfplay_jax.checkpoints import Checkpoints
from selfplay_jax.data import builtin
from selfplay_jax.data.templates import load_tokenizer
from selfplay_jax.errors import UserError
from selfplay_jax.evaluation import likelihood, lm_eval, suites
from selfplay_jax.evaluation.likelihood import likelihoods
from selfplay_jax.evaluation.load import load_model
from selfplay_jax.models.decoder import Model

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
from lm_eval.api.instance import Instance

from selfplay_jax.evaluation.harness import HarnessLM

# --- log-likelihoods of continuations


def pairs_of(rng):
    """Contexts of many lengths with 1 to 40 continuations each, some pairs twice, shuffled."""
    pairs = []
    for length, count in ((1, 3), (2, 40), (9, 1), (17, 4), (17, 2), (30, 5), (44, 1)):
        (context,) = random_rows(rng, [length])
        pairs += [(context, row) for row in random_rows(rng, rng.integers(1, 12, size=count).tolist())]
    pairs += [pairs[i] for i in (0, 5, 5, 50)]
    return [pairs[i] for i in rng.permutation(len(pairs))]


def expected(config, params, context, continuation):
    logits = reference_logits(config, params, [*context, *continuation])[len(context) - 1 : -1]
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logps[np.arange(len(continuation)), continuation].sum(), logits.argmax(-1).tolist() == continuation


@pytest.mark.parametrize(("config", "shape"), [(PLAIN, (1, 1)), (WINDOWED, (4, 2))], ids=["plain", "windowed-4x2"])
def test_likelihoods_equal_float64_whatever_shares_a_context(config, shape):
    model = Model(config)
    host = loud_params(model, 3)
    rng = np.random.default_rng(0)
    pairs = pairs_of(rng)
    for i in (1, 2, 30):  # greedy ones
        context, drawn = pairs[i][0], []
        for _ in range(1 + i % 3):
            drawn.append(int(reference_logits(config, host, context + drawn)[-1].argmax()))
        pairs.append((context, drawn))
    mesh = (
        mesh_of(*shape)
        if shape != (1, 1)
        else jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tensor"))
    )
    params = jax.device_put(host, model.shardings(mesh))
    reported = []
    found = likelihoods(model, params, pairs, mesh=mesh, batch_size=4, on_progress=reported.append)
    wanted = [expected(config, host, *pair) for pair in pairs]
    np.testing.assert_allclose(found.logps, [logp for logp, _ in wanted], atol=2e-4)
    assert found.greedy.tolist() == [greedy for _, greedy in wanted]
    assert 3 <= found.greedy.sum() < len(pairs) / 2
    assert sum(reported) == len(pairs)


def test_each_context_is_computed_once_with_all_its_continuations(monkeypatch):
    """Counts what reaches the model: 3 contexts, 4 choices each, asked twice over in another order."""
    model, groups = Model(PLAIN), []
    real = likelihood.pack
    monkeypatch.setattr(likelihood, "pack", lambda *a, **k: groups.append(real(*a, **k)) or groups[-1])
    rng = np.random.default_rng(1)
    contexts = random_rows(rng, [20, 21, 22])
    pairs = [(context, row) for context in contexts for row in random_rows(rng, [3, 4, 5, 6])]
    mesh = mesh_of(8, 1)
    params = jax.device_put(loud_params(model, 3), model.shardings(mesh))
    found = likelihoods(model, params, pairs + pairs[::-1], mesh=mesh, batch_size=8)
    (group,) = groups
    assert group.prompt.shape == (8, 24) and group.responses.shape == (8, 4, 8)
    assert len({tuple(row) for row in group.prompt.tolist()}) == 3
    np.testing.assert_array_equal(found.logps[: len(pairs)], found.logps[len(pairs) :][::-1])


def test_widths():
    many, few = likelihood._Plan(16, 1, few=False), likelihood._Plan(16, 1, few=True)
    lengths = range(1, 1025)
    octaves = [*range(8, 65, 8), *range(80, 129, 16), *range(160, 257, 32), *range(320, 513, 64), 640, 768, 896, 1024]
    assert sorted({many.width(n) for n in lengths}) == [1, *octaves]
    assert sorted({few.width(n) for n in lengths}) == [1, *range(8, 1025, 8)]
    assert all(plan.width(n) >= n for plan in (many, few) for n in lengths)
    assert sorted({likelihood._columns(n) for n in range(1, 33)}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert all(likelihood._columns(n) >= n for n in range(1, 33))


def rows_like(rng, count, contexts, columns, lengths):
    return [
        likelihood._Row(
            (1,) * rng.integers(*contexts), [(2,) * rng.integers(*lengths) for _ in range(rng.integers(*columns))]
        )
        for _ in range(count)
    ]


def test_batches_hold_every_row_once_with_little_padding_and_few_shapes():
    rng = np.random.default_rng(3)
    letters = rows_like(rng, 500, (200, 900), (4, 5), (1, 2))
    endings = rows_like(rng, 500, (200, 900), (3, 6), (5, 60))
    texts = rows_like(rng, 100, (1, 2), (1, 2), (50, 3000))
    rows = letters + endings + texts
    plan = likelihood._Plan(16, 2, few=False)
    batches = list(plan.batches(rows))
    assert sorted(map(id, rows)) == sorted(id(row) for batch in batches for row in batch)
    sizes = [plan.sizes(batch) for batch in batches]
    for batch, (count, context, _, width) in zip(batches, sizes, strict=True):
        assert len(batch) <= count <= 16 and count % 2 == 0
        assert count * (context + width) ** 2 <= 2 * 16 * 1200**2 or count == 2  # what attention holds
    padded = sum(count * (context + columns * width) for count, context, columns, width in sizes)
    real = sum(len(row.context) + sum(map(len, row.continuations)) for row in rows)
    assert padded < 1.35 * real
    assert len(set(sizes)) < 70


def test_an_empty_side_is_refused():
    model, mesh = Model(PLAIN), mesh_of(8, 1)
    for pair in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="one token at least"):
            likelihoods(model, {}, [pair], mesh=mesh, batch_size=1)


# --- the adapter against the rules


@pytest.fixture(scope="module", params=toy.MODELS)
def brought(request):
    """The adapter on a model from disk, and the oracle on the same weights."""
    directory = toy.model_directory(request.param, request)
    model, params, source = load_model(directory)
    tokenizer = load_tokenizer(source)
    # A short length: the oracle is slow, and truncation happens at 64 as at 4,096.
    lm = HarnessLM(model, params, tokenizer, batch_size=8, max_length=64)
    return lm, toy.Oracle(model.config, jax.device_get(params), tokenizer, 64)


def requests(kind, arguments):
    return [Instance(kind, {}, arguments=a, idx=i, metadata=("t", i, 1)) for i, a in enumerate(arguments)]


CONTEXT = "once upon a time there was a little girl"
PAIRS = [
    (CONTEXT, " named lily"),
    (CONTEXT, " who"),
    (CONTEXT + "  ", "who"),  # trailing spaces move to the continuation
    (CONTEXT, "."),
    ("", "one day"),
    ("", " tom"),
    (" ".join([CONTEXT] * 20), " and her mom went to the park"),  # longer than the model
    (" ".join([CONTEXT] * 20), " named"),
    ("a" * 70, " " + "b c " * 14),  # the context alone is cut away but for its end
    (CONTEXT, " who"),  # twice
    (CONTEXT, " named lily"),
]


def test_loglikelihood(brought):
    lm, oracle = brought
    found = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    wanted = [oracle.loglikelihood(*pair) for pair in PAIRS]
    np.testing.assert_allclose([logp for logp, _ in found], [logp for logp, _ in wanted], atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert found[0] == found[-1] and found[1] == found[-2]


def test_a_greedy_continuation_is_told(brought):
    lm, oracle = brought
    context = oracle.encode("one day tom")
    drawn = oracle.greedy_tokens(context, 6)
    wrong = [*drawn[:-1], drawn[-1] ^ 1]
    found = lm._loglikelihood_tokens([(None, context, drawn), (None, context, wrong), (None, context, drawn[:1])])
    assert [greedy for _, greedy in found] == [True, False, True]


def test_loglikelihood_rolling(brought):
    lm, oracle = brought
    texts = ["a", "one day", " ".join([CONTEXT] * 12), CONTEXT, "the dog " * 100]
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]))
    np.testing.assert_allclose(found, [oracle.rolling(text) for text in texts], rtol=1e-5, atol=1e-3)


def test_generate_until(brought):
    lm, oracle = brought
    asked = [
        (CONTEXT, ["el"], 24),
        ("12+34-5", ["#", "\n"], 24),
        ("once upon a time", [" the", "an"], 24),
        (" ".join([CONTEXT] * 9), [".", "!"], 24),  # loses its left
        ("one day", [], 9),
        ("30+21-13", ["-1"], 24),
        ("a)12+34=46;", ["=", "#"], 24),
        (CONTEXT, ["."], 24),
    ]
    found = lm.generate_until(
        requests("generate_until", [(c, {"until": until, "max_gen_toks": most}) for c, until, most in asked])
    )
    assert found == [oracle.greedy(*one) for one in asked]
    assert not any(stop in text for text, (_, until, _) in zip(found, asked, strict=True) for stop in until)
    assert sum(map(bool, found)) >= 3


def test_equal_greedy_questions_are_answered_once(brought, monkeypatch):
    lm, _ = brought
    asked = []
    monkeypatch.setattr(lm, "_generate", lambda contexts, options, advance: asked.append(contexts) or contexts)
    same = [(context, {"until": ["x"], "max_gen_toks": 9}) for context in "aba"]
    assert lm.generate_until(requests("generate_until", same)) == ["a", "b", "a"]
    sampled = [(context, {**options, "do_sample": True, "temperature": 0.7}) for context, options in same]
    assert lm.generate_until(requests("generate_until", sampled)) == ["a", "b", "a"]
    assert asked == [["a", "b"], ["a", "b", "a"]]


def test_sampled_answers_follow_the_seed_and_differ_between_repeats(brought):
    lm, _ = brought
    options = {"until": ["\n"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 16}
    asked = requests("generate_until", [("12+34-5", options)] * 6)
    first = lm.generate_until(asked)
    assert len(set(first)) > 1 and lm.generate_until(asked) == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": ["x"], "num_beams": 4}, "num_beams=4"),
        ({"until": ["x"], "max_gen_toks": 64}, "no room"),
    ],
    ids=str,
)
def test_options_that_cannot_be_followed_are_refused(brought, options, message):
    with pytest.raises(UserError, match=message):
        brought[0].generate_until(requests("generate_until", [("a", options)]))


def test_options_have_the_defaults_of_the_hf_backend(brought):
    lm, eos = brought[0], brought[0].tokenizer.eos_token
    greedy = lm._options({"until": "x", "temperature": 0.5, "do_sample": False, "num_beams": 1, "max_gen_toks": 9})
    assert greedy == {"until": ["x", eos], "max_new_tokens": 9, "temperature": 0.0, "top_k": 50, "top_p": 1.0}
    sampled = lm._options({"until": ["x"], "temperature": 0.5, "max_new_tokens": 8, "top_p": 0.9, "top_k": 0})
    assert sampled == {"until": ["x", eos], "max_new_tokens": 8, "temperature": 0.5, "top_k": 0, "top_p": 0.9}


def test_a_continuation_longer_than_the_model_is_refused(brought):
    with pytest.raises(UserError, match="the model's length"):
        brought[0].loglikelihood(requests("loglikelihood", [("a", " b c" * 100)]), disable_tqdm=True)


def test_chat_template(brought):
    lm, _ = brought
    history = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    before = lm.tokenizer.chat_template
    try:
        lm.tokenizer.chat_template = None
        with pytest.raises(UserError, match="no chat template"):
            lm.apply_chat_template(history)
        lm.tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
        )
        assert lm.apply_chat_template(history) == "[user]hello[assistant]"
        begun = [*history[1:], {"role": "assistant", "content": "well,"}]
        assert lm.apply_chat_template(begun, add_generation_prompt=False) == "[user]hello[assistant]well,"
        assert lm.chat_template(True) == lm.tokenizer.chat_template
        assert "/" not in lm.tokenizer_name
    finally:
        lm.tokenizer.chat_template = before


# --- the command line


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return toy.write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def local_tasks(tasks, monkeypatch):
    """The command line sees the local tasks alone: reading lm-eval's own takes long."""
    import lm_eval.tasks

    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_path=None: real(include_path=str(include_path or tasks), include_defaults=False),
    )
    return tasks


def command(*arguments):
    return lm_eval.main(
        ["--model", str(builtin.BASE), "--batch_size", "8", "--compilation_cache", "", *map(str, arguments)]
    )


def test_command_line_prints_the_table_and_writes_the_results(local_tasks, tmp_path, capsys):
    file = tmp_path / "results.json"
    assert (
        command("--tasks", "toy", "--include_path", local_tasks, "--output", file, "--log_samples", "--limit", 4) == 0
    )
    printed = capsys.readouterr().out
    assert "|toy_choice_shots" in printed.replace(" ", "") or "toy_choice_shots" in printed
    results = json.loads(file.read_text())
    assert set(results["samples"]) == set(toy.TASKS)
    assert 0 <= results["results"]["toy_choice"]["acc,none"] <= 1
    assert results["n-shot"]["toy_choice_shots"] == 2
    assert all(len(samples) == 4 for samples in results["samples"].values())
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "toy_choise"], "no task or group 'toy_choise'; did you mean toy_choice"),
        (["--tasks", ","], "no task is named"),
        (["--tasks", "toy,toy_text"], "names toy_text twice, by toy and toy_text"),
        (["--tasks", "toy_text", "--model", "./nowhere"], "no directory nowhere"),
        (["--tasks", "toy_text", "--player", "best"], "no run's workdir"),
        (["--tasks", "toy_text", "--dtype", "int8"], "dtype 'int8'"),
        (["--tasks", "toy_text", "--mesh", "2"], "FSDP,TENSOR"),
        (["--tasks", "toy_text", "--mesh", "3,1"], "do not fit"),
        (["--tasks", "toy_text", "--include_path", "nowhere"], "is no directory"),
        (["--tasks", "toy_text", "--log_samples"], "needs --output"),
        (["--tasks", "toy_text", "--fewshot_as_multiturn"], "needs --apply_chat_template"),
        (["--tasks", "toy_text", "--limit", "0"], "--limit more than 0"),
        (["--tasks", "toy_story", "--apply_chat_template"], "no chat template"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_user_errors_are_one_sentence(local_tasks, monkeypatch, capsys, arguments, message):
    assert command(*arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_missing_data_is_one_sentence(local_tasks, tmp_path, capsys):
    (tmp_path / "gone.yaml").write_text(
        "task: gone\ndataset_path: nobody/nothing-of-the-kind\noutput_type: multiple_choice\ntest_split: test\n"
        "doc_to_text: q\ndoc_to_choice: c\ndoc_to_target: t\n"
    )
    assert command("--tasks", "gone", "--include_path", tmp_path) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: task gone: its data or definition cannot be loaded (is the network there")


def test_without_lm_eval_the_command_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(lm_eval.importlib.util, "find_spec", lambda name: None)
    assert command("--tasks", "gsm8k") == 1
    assert "pip install 'selfplay_jax[eval]'" in capsys.readouterr().err


def test_the_package_imports_without_lm_eval():
    code = (
        "import sys, selfplay_jax.evaluation, selfplay_jax.evaluation.lm_eval, selfplay_jax.evaluation.suites\n"
        "import selfplay_jax.evaluation.gsm8k, selfplay_jax.evaluation.load, selfplay_jax.evaluation.texts\n"
        "assert 'lm_eval' not in sys.modules and 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- suites


@pytest.fixture(scope="module")
def registry():
    """lm-eval's own index of the folders that the suites' tasks lie in (reading all of them takes half a minute)."""
    import pathlib

    import lm_eval.tasks

    root = pathlib.Path(lm_eval.tasks.__file__).parent
    folders = ("arc", "hellaswag", "mmlu/default", "truthfulqa", "winogrande", "gsm8k", "leaderboard")
    return lm_eval.tasks.TaskManager(include_path=[str(root / f) for f in folders], include_defaults=False)


def test_every_suite_names_what_lm_eval_has(registry):
    for entries in suites.SUITES.values():
        suites.check(entries, registry)
    with pytest.raises(UserError, match="did you mean open_llm_v1"):
        suites.check([suites.Entry("open_llm_v11")], registry)


def test_the_second_leaderboard_is_the_paper_s(registry):
    """The group's members and, in their YAML files, the numbers of shots that TPAW's paper states."""
    from lm_eval.tasks._yaml_loader import load_yaml

    root = registry.task_index["leaderboard"].yaml_path
    members = load_yaml(root, resolve_func=False)["task"]
    shots = {"mmlu_pro": 5, "bbh": 3, "gpqa": 0, "math_hard": 4, "ifeval": 0, "musr": 0}
    assert sorted(members) == sorted(f"leaderboard_{name}" for name in shots)
    for name, count in shots.items():
        leaves = [leaf for leaf in registry.all_subtasks if leaf.startswith(f"leaderboard_{name}")]
        leaves += [
            leaf for leaf in registry.all_subtasks if name == "math_hard" and leaf.startswith("leaderboard_math_")
        ]
        assert leaves
        for leaf in leaves:
            config = load_yaml(registry.task_index[leaf].yaml_path, resolve_func=False, recursive=True)
            assert config.get("num_fewshot", 0) == count, leaf


def test_expand():
    v1 = [(e.task, e.shots) for e in suites.expand("open_llm_v1")]
    assert v1 == [
        ("arc_challenge", 25), ("hellaswag", 10), ("mmlu", 5), ("truthfulqa_mc2", 0), ("winogrande", 5), ("gsm8k", 5),
    ]  # fmt: skip
    assert [e.task for e in suites.expand("tpaw")] == [task for task, _ in v1] + ["leaderboard"]
    assert suites.expand("gsm8k, open_llm_v2,gsm8k") == [suites.Entry("gsm8k"), suites.Entry("leaderboard")]


def test_a_suite_s_shots_reach_the_tasks(tasks):
    loaded = suites.load([suites.Entry("toy_choice", 3), suites.Entry("toy_choice_shots")], toy.manager(tasks))
    assert [task.config.num_fewshot for task in loaded] == [3, 2]
    (group,) = suites.load([suites.Entry("toy", 4)], toy.manager(tasks))
    assert {task.config.num_fewshot for task in group.get_all_tasks()} == {4}


# --- loading


@pytest.fixture
def workdir(tmp_path):
    """A run's workdir with players 0, 2 and 3; the weights of player j are scaled by 1 + j."""
    _, params, _ = load_model(builtin.BASE)
    config = {
        "method": "spin",
        "window": 2,
        "model": {"path": "builtin", "compute_dtype": "float32", "param_dtype": "float32", "remat": "none"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoints = Checkpoints(tmp_path / "checkpoints", window=2)
    for index, score in ((0, 0.1), (1, 0.3), (2, 0.7), (3, 0.5)):
        checkpoints.save_player(index, jax.tree.map(lambda x, f=1 + index: x * f, params), score=score)
    checkpoints.close()
    return tmp_path, params


def test_players_of_a_run(workdir):
    path, params = workdir
    for player, factor in ((None, 4), ("final", 4), ("best", 3), ("0", 1), (2, 3)):
        model, found, source = load_model(path, player=player)
        assert source == str(builtin.BASE) and model.compute_dtype == "float32"
        jax.tree.map(lambda a, b, f=factor: np.testing.assert_array_equal(a, f * b), found, params)
    model, found, _ = load_model(path, dtype="bfloat16")
    assert model.param_dtype == model.compute_dtype == "bfloat16"
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(found)} == {"bfloat16"}
    with pytest.raises(UserError, match=r"no player 1; it holds \[0, 2, 3\]"):
        load_model(path, player=1)
    with pytest.raises(UserError, match="no player newest"):
        load_model(path, player="newest")


def test_a_run_without_players_or_evaluations(tmp_path, workdir):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(empty)
    (empty / "config.json").write_text((workdir[0] / "config.json").read_text())
    with pytest.raises(UserError, match="no checkpoints"):
        load_model(empty)
    checkpoints = Checkpoints(empty / "checkpoints", window=2)
    with pytest.raises(UserError, match="no checkpoints"):
        load_model(empty)
    checkpoints.save_player(0, workdir[1], score=None)
    checkpoints.close()
    with pytest.raises(UserError, match="none is the best"):
        load_model(empty, player="best")


def test_a_directory_s_own_dtype(tmp_path):
    model, params, source = load_model(builtin.BASE, dtype="bfloat16", mesh=mesh_of(4, 2))
    assert model.compute_dtype == "bfloat16" and source == str(builtin.BASE)
    assert all(leaf.dtype == "bfloat16" and len(leaf.devices()) == 8 for leaf in jax.tree.leaves(params))
    for file in builtin.BASE.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert load_model(tmp_path)[0] == dataclasses.replace(model)


# --- against the harness' own backend


@pytest.mark.torch
@pytest.mark.parametrize("name", toy.MODELS)
def test_answers_equal_those_of_the_hf_backend(name, request, tasks):
    torch = pytest.importorskip("torch", reason="torch is not installed (.ci/run installs it)")
    pytest.importorskip("accelerate", reason="accelerate is not installed; lm-eval's hf backend needs it")
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    directory = toy.model_directory(name, request)
    model, params, source = load_model(directory)
    ours = HarnessLM(model, params, load_tokenizer(source), batch_size=8)
    theirs = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=1)
    assert (ours.max_length, ours.prefix_token_id, ours.eot_token_id) == (
        theirs.max_length, theirs.prefix_token_id, theirs.eot_token_id,
    )  # fmt: skip
    assert (ours.tokenizer_name, ours.max_gen_toks) == (theirs.tokenizer_name, theirs.max_gen_toks)
    found, wanted = (toy.evaluate(lm, tasks, ["toy"]) for lm in (ours, theirs))
    for task, expected_answers in toy.answers(wanted).items():
        given = toy.answers(found)[task]
        if "story" in task:
            assert given == expected_answers
            continue
        if "choice" in task:
            assert [greedy for _, greedy in given] == [greedy for _, greedy in expected_answers]
            given, expected_answers = ([logp for logp, _ in side] for side in (given, expected_answers))
        np.testing.assert_allclose(given, expected_answers, rtol=1e-6, atol=1e-3)
    for task, metrics in wanted["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                assert found["results"][task][metric] == pytest.approx(value, rel=1e-4), (task, metric)
