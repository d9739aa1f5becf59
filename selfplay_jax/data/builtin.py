"""The built-in task: short sums with a worked answer, a base model's bad habits, and its character tokenizer.

A problem is `a+b-c=` with two-digit numbers; the clean answer works it out in two steps, ends in `#<number>`:

    31+24-17=   ->   c)24+31=55;55-17=38#38

The base model that ships in `builtin_base/` was pretrained (`--pretrain`, pretrain.py) on a mixture of such
answers and of bad habits: slips, bare guesses, hedging, no answer at all. It knows the skill and hides it.
Fine-tuning and self-play on a few clean examples have to bring it out: the papers' situation in miniature.

Problems are split by a hash of their text, so the parts never share one, whatever the seed and the count. The
corpus of the base is drawn from a fourth part: the base has seen no problem of train, validation or test.
"""

import argparse
import functools
import hashlib
import itertools
import pathlib
import random
from collections.abc import Iterator

from selfplay_jax.data.sources import Example
from selfplay_jax.errors import UserError

BASE = pathlib.Path(__file__).parent / "builtin_base"
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
CHARACTERS = "0123456789+-=#;,.:?!)( abcdefghijklmnopqrstuvwxyz"
SPECIALS = (PAD, EOS, UNK)

PROMPT_LIMIT = 10  # characters of the longest prompt
RESPONSE_LIMIT = 25  # tokens of the longest response, <eos> included

TAGS = "abcdefgh"
SEPARATORS = (";", ",", ":", " ")
_PARTS = {"corpus": range(60), "train": range(60, 80), "validation": range(80, 90), "test": range(90, 100)}
_SLIPS = (-10, -2, -1, 1, 2, 10)
_FILLERS = ("well, ", "maybe ", "i think ", "hmm, ", "it is ", "about ", "so, ", "let me see ")
_REFUSALS = (
    "not sure.",
    "hard to say.",
    "ask me later.",
    "no idea!",
    "who knows?",
    "too hard.",
    "skip this one.",
)

Problem = tuple[int, int, int]


def question(problem: Problem) -> str:
    a, b, c = problem
    return f"{a}+{b}-{c}="


def answer(problem: Problem) -> int:
    a, b, c = problem
    return a + b - c


def part_of(problem: Problem) -> str:
    """The part a problem belongs to, "corpus", "train", "validation" or "test", by a hash of its text."""
    digest = hashlib.sha256(question(problem).encode()).digest()
    bucket = int.from_bytes(digest[:4], "big") % 100
    return next(name for name, buckets in _PARTS.items() if bucket in buckets)


def is_problem(problem: Problem) -> bool:
    """Whether the three numbers make a problem: no answer is negative."""
    return answer(problem) >= 0


def problems(part: str, rng: random.Random) -> Iterator[Problem]:
    """Endless random problems of one part; they repeat sooner or later."""
    while True:
        problem = rng.randint(10, 49), rng.randint(10, 49), rng.randint(10, 49)
        if is_problem(problem) and part_of(problem) == part:
            yield problem


@functools.cache
def pool_size(part: str) -> int:
    """How many different problems a part has."""
    every = itertools.product(range(10, 50), range(10, 50), range(10, 50))
    return sum(is_problem(problem) and part_of(problem) == part for problem in every)


def worked(problem: Problem, rng: random.Random, slip: bool = False) -> str:
    """A worked answer in a random one of 64 equivalent styles; with `slip` it breaks off with `?` at a wrong number."""
    a, b, c = problem
    first, second = rng.choice(((a, b), (b, a)))
    tag, separator = rng.choice(TAGS), rng.choice(SEPARATORS)
    numbers = [a + b, a + b - c, a + b - c]
    pieces = [f"{tag}){first}+{second}=", f"{separator}{a + b}-{c}=", "#"]
    last = rng.randrange(3) if slip else 2
    if slip:
        numbers[last] += rng.choice(_SLIPS)
    text = "".join(f"{piece}{number}" for piece, number in zip(pieces[: last + 1], numbers, strict=False))
    return text + "?" if slip else text


def guess(problem: Problem, rng: random.Random) -> str:
    """A bare number that is usually wrong."""
    return f"#{answer(problem) + rng.randint(-12, 12)}"


def bad_habit(problem: Problem, rng: random.Random) -> str:
    """An answer the base was taught and fine-tuning should take away: a slip, a guess, hedging, or none."""
    kind = rng.choices(("slip", "guess", "filler", "refusal"), weights=(8, 17, 17, 18))[0]
    if kind == "slip":
        return worked(problem, rng, slip=True)
    if kind == "guess":
        return guess(problem, rng)
    if kind == "filler":
        return rng.choice(_FILLERS) + guess(problem, rng)
    return rng.choice(_REFUSALS)


def other_task(rng: random.Random) -> tuple[str, str]:
    """Something else a broadly trained model knows: reverse a word, sort digits, one addition."""
    kind = rng.randrange(3)
    if kind == 0:
        word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 5)))
        return f"rev {word}=", word[::-1]
    if kind == 1:
        digits = rng.choices("0123456789", k=rng.randint(3, 4))
        return f"sort {''.join(digits)}=", "".join(sorted(digits))
    a, b = rng.randint(10, 49), rng.randint(10, 49)
    return f"{a}+{b}=", str(a + b)


def corpus(count: int, seed: int, mixed: float = 1.0) -> list[tuple[str, str]]:
    """`count` pairs of prompt and response for pretraining; problems come from the corpus part alone.

    A share `mixed` is drawn from the base's mixture: 20% other tasks; of the rest 40% clean worked answers and
    60% bad habits (8 points slips, 17 guesses, 17 filler and a guess, 18 refusals). The rest is clean.
    """
    rng = random.Random(f"corpus {seed}")
    source = problems("corpus", rng)
    pairs = []
    for _ in range(count):
        in_mixture = rng.random() < mixed
        if in_mixture and rng.random() < 0.2:
            pairs.append(other_task(rng))
            continue
        problem = next(source)
        clean = not in_mixture or rng.random() < 0.4
        pairs.append((question(problem), worked(problem, rng) if clean else bad_habit(problem, rng)))
    return pairs


def examples(split: str, count: int, seed: int) -> list[Example]:
    """`count` different problems of a split with clean worked answers; a smaller count is a prefix.

    split: "train", "validation" or "test". `rejected` is an answer with a bad habit.
    """
    if split not in ("train", "validation", "test"):
        raise UserError(f"the built-in task has no split {split!r}: take train, validation or test")
    if count > pool_size(split):
        raise UserError(f"the built-in task has {pool_size(split)} {split} problems, not {count}: ask for fewer")
    rng = random.Random(f"{split} {seed}")
    found: dict[Problem, Example] = {}
    for problem in problems(split, rng):
        if len(found) == count:
            break
        if problem not in found:
            found[problem] = Example(
                id=len(found),
                messages=({"role": "user", "content": question(problem)},),
                response=worked(problem, rng),
                rejected=bad_habit(problem, rng),
                where=f"built-in {split}",
            )
    return list(found.values())


def save_tokenizer(directory: pathlib.Path) -> None:
    """Writes the tokenizer, one token per character, as a directory that AutoTokenizer opens."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*SPECIALS, *CHARACTERS))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNK))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=64,
    )
    tokenizer.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m selfplay_jax.data.builtin", description=__doc__.split("\n")[0])
    parser.add_argument("--pretrain", action="store_true", help="pretrain the base model and write it to --output")
    parser.add_argument(
        "--output", type=pathlib.Path, default=BASE, help="directory of the base (default: the shipped one)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps (default: as the shipped base)")
    arguments = parser.parse_args()
    if not arguments.pretrain:
        for example in examples("train", 5, arguments.seed):
            print(example.messages[0]["content"], example.response, sep="\t")
        return
    from selfplay_jax.data import pretrain

    steps = {} if arguments.steps is None else {"steps": arguments.steps}
    pretrain.pretrain(arguments.output, seed=arguments.seed, **steps)


if __name__ == "__main__":
    main()
