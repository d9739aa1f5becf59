"""Sampling and DPO training against transformers and TRL on the same machine, model and data, in one run.

    python benchmarks/throughput.py --tokenizer DIR --data train.jsonl [--prompts 64] [--pairs 64]

The data have the columns question and answer. Chosen is the real answer, rejected the answer to another question. The
model is random, Qwen2-shaped, 10M parameters, float32; every response has the same number of tokens. Needs torch and
trl beside this package. Prints tokens/s and pairs/s, the first call (with compilation) and the later ones.
"""

import argparse
import json
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

from selfplay_jax import partitioning
from selfplay_jax.data.templates import load_tokenizer
from selfplay_jax.groups import REJECTED
from selfplay_jax.methods import plan
from selfplay_jax.models import Model, ModelConfig, save_hf
from selfplay_jax.sampling import generate
from selfplay_jax.scoring import score
from selfplay_jax.table import Table, schedule
from selfplay_jax.train import Settings, programs

LIMIT, NEW = 160, 64  # tokens of a prompt and of an answer, at most
BATCH = 16  # pairs


def ours_sampling(model: Model, params: Any, prompts: list[list[int]]) -> list[float]:
    """Seconds of two calls."""
    seconds = []
    for seed in range(2):
        began = time.perf_counter()
        samples = generate(model, params, prompts, seed=seed, max_new_tokens=NEW, stop_ids=(), slots=64)
        assert samples.lengths.sum() == NEW * len(prompts)
        seconds.append(time.perf_counter() - began)
    return seconds


def ours_training(model: Model, params: Any, rows: list[tuple[list[int], list[int], list[int]]]) -> list[float]:
    """Seconds of two epochs, the reference scored once in the first."""
    mesh = partitioning.make_mesh()
    row = plan("dpo", {"beta": 0.1, "kind": "logistic"}, round_index=0, window=1)
    assert row.opponents == (REJECTED,)
    settings = Settings(
        epochs=1, batch_size=BATCH, accumulate=1, optimizer="adamw", b1=0.9, b2=0.999, eps=1e-8, decay=0.99,
        weight_decay=0.0, clip_norm=1.0, learning_rate=1e-6, schedule="constant", warmup=0.0, checkpoint_every=1,
    )  # fmt: skip
    parts, seconds, table, state = programs(model, row.objective, settings, mesh), [], None, None
    prompts, chosen, rejected = (list(column) for column in zip(*rows, strict=True))
    for epoch in range(2):
        began = time.perf_counter()
        if table is None:
            columns = [[y, z] for y, z in zip(chosen, rejected, strict=True)]
            players = score(model, params, prompts, columns, mesh=mesh, batch_size=BATCH)[None]
            usable = [np.ones((len(rows), 1), bool)]
            table = Table(prompts, chosen, [[[z] for z in rejected]], usable, [players[..., :1], players[..., 1:]])
            state = parts.init(params)
        for _, batch_rows in schedule(len(rows), BATCH, 1, seed=0, round_index=epoch):
            batch = table.batch(batch_rows, size=BATCH, epoch=0, per_round=1)
            state, metrics = parts.step(state, {}, jax.device_put(batch, parts.rows), np.float32(1e-6))
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - began)
    return seconds


def theirs_sampling(directory: str, prompts: list[list[int]]) -> list[float]:
    """Seconds of two calls of transformers' generate, all prompts in one batch."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, min_new_tokens=NEW, max_new_tokens=NEW,
                pad_token_id=0,
            )  # fmt: skip
        assert out.shape[1] == width + NEW
        seconds.append(time.perf_counter() - began)
    return seconds


def theirs_training(directory: str, tokenizer: Any, texts: list[dict[str, str]], precompute: bool) -> float:
    """Seconds of one epoch of TRL's DPOTrainer, the reference's log-probabilities included."""
    import datasets
    import transformers
    import trl

    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.DPOConfig(
            output_dir=folder, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=1e-6, beta=0.1,
            max_length=LIMIT + NEW, precompute_ref_log_probs=precompute, report_to=[], save_strategy="no",
            logging_strategy="no", gradient_checkpointing=False, bf16=False, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        data = datasets.Dataset.from_list(texts)
        began = time.perf_counter()
        trl.DPOTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer).train()
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True, type=pathlib.Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=64)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = options.data.read_text().splitlines()[: max(options.prompts, options.pairs)]
    records = [json.loads(line) for line in lines]
    config = ModelConfig(
        "qwen2", len(tokenizer), 256, 1024, 8, 4, 2, 64, rope_theta=1e6, tie_embeddings=True, qkv_bias=True,
        stop_ids=(tokenizer.eos_token_id,),
    )  # fmt: skip
    model = Model(config, logits_chunk=64)
    params = model.init(jax.random.key(0))

    def ids(text: str, limit: int) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)[:limit]

    prompts = [ids(record["question"], LIMIT) for record in records]
    answers = [ids(" " + record["answer"], NEW) for record in records]
    rows = list(zip(prompts, answers, answers[1:] + answers[:1], strict=True))[: options.pairs]
    names = ("prompt", "chosen", "rejected")
    words = [dict(zip(names, map(tokenizer.decode, row), strict=True)) for row in rows]
    tokens, pairs = NEW * options.prompts, options.pairs
    with tempfile.TemporaryDirectory() as directory:
        save_hf(directory + "/model", model, params, source=options.tokenizer)
        first, later = ours_sampling(model, params, prompts[: options.prompts])
        peer_first, peer_later = theirs_sampling(directory + "/model", prompts[: options.prompts])
        print("| | first call | later | ratio to transformers / TRL, later (first) |\n|---|---|---|---|")
        ratio = f"{peer_later / later:.2f} ({peer_first / first:.2f})"
        print(f"| ours, sampling tok/s | {tokens / first:.0f} | {tokens / later:.0f} | {ratio} |")
        print(f"| transformers generate, tok/s | {tokens / peer_first:.0f} | {tokens / peer_later:.0f} | |")
        epoch_first, epoch = ours_training(model, params, rows)
        plain, ahead = (theirs_training(directory + "/model", tokenizer, words, flag) for flag in (False, True))
        ratio = f"{min(plain, ahead) / epoch:.2f} ({min(plain, ahead) / epoch_first:.2f})"
        print(f"| ours, DPO pairs/s | {pairs / epoch_first:.2f} | {pairs / epoch:.2f} | {ratio} |")
        print(f"| TRL DPOTrainer, pairs/s | {pairs / plain:.2f} | | |")
        print(f"| the same, precompute_ref_log_probs | {pairs / ahead:.2f} | | |")


if __name__ == "__main__":
    main()
