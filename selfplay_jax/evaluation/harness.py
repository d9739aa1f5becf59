"""The adapter to lm-evaluation-harness: our scoring and our sampler behind `lm_eval.api.model.LM`.

Its answers are those of the harness' own `hf` backend with a batch size of one: the same tokens, truncations, stop
strings and defaults. Import it inside functions: it needs lm_eval, the rest of the package does not.
"""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from selfplay_jax import partitioning
from selfplay_jax.errors import UserError
from selfplay_jax.evaluation.likelihood import likelihoods
from selfplay_jax.evaluation.texts import generate_texts
from selfplay_jax.models.decoder import Model, Params
from selfplay_jax.progress import progress

# Generation options that the sampler has, and the values of others that ask for nothing.
_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1, 1.0),
    "length_penalty": (1, 1.0),
    "min_p": (0, 0.0, None),
}

# Keys and values of the responses that are decoded together beyond batch_size.
_CACHE_BYTES = 2**31


class HarnessLM(TemplateLM):
    """A model and its tokenizer for `lm_eval.simple_evaluate(model=HarnessLM(...), tasks=[...])`."""

    backend = "causal"

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Any,
        *,
        mesh: Mesh | None = None,
        batch_size: int = 16,
        decode_params: Params | None = None,
        decode_mesh: Mesh | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        check_stop: Callable[[], None] = lambda: None,
    ):
        """Args:
        params: in the training layout of `mesh`, or anywhere.
        tokenizer: a transformers tokenizer.
        mesh: None is the first device.
        batch_size: contexts scored together (each with all its continuations); responses decoded together, or up to
          four times as many where their keys and values take less than 2 GiB.
        decode_params, decode_mesh: the same parameters laid out for decoding, and where; by default `params` on `mesh`.
        max_length: tokens that the model sees, by default its `max_position_embeddings`; longer inputs lose their left.
        max_gen_toks: tokens generated where the task does not say.
        add_bos_token: whether texts get a BOS; None leaves it to the tokenizer.
        prefix_token_id: what stands before an empty context, by default BOS, else EOS.
        seed: of sampled (not greedy) generations.
        check_stop: called now and then; may raise to end the evaluation.
        """
        super().__init__()
        self.tokenizer = tokenizer
        self.batch_size, self.max_gen_toks = batch_size, max_gen_toks
        self.max_length = max_length or model.config.max_position_embeddings
        self._mesh = mesh or partitioning.make_mesh(1, 1, jax.devices()[:1])
        self._model, self._params = model, jax.device_put(params, model.shardings(self._mesh))
        self._decode_params = self._params if decode_params is None else decode_params
        self._decode_mesh = decode_mesh or self._mesh
        self._add_bos, self._prefix, self._seed = add_bos_token, prefix_token_id, seed
        self._check_stop = check_stop
        self._remembered = functools.lru_cache(maxsize=64)(self._encode)  # one context comes with all its choices

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context."""
        if self._prefix is not None:
            return self._prefix
        bos = self.tokenizer.bos_token_id
        token = self.eot_token_id if bos is None else bos
        if token is None:
            raise UserError("the tokenizer has neither a bos_token nor an eos_token; give prefix_token_id")
        return token

    @property
    def tokenizer_name(self) -> str:
        """Names the harness' caches of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The dialogue as the tokenizer's chat template writes it; without system turns where it refuses those.

        Raises:
          UserError: the tokenizer has no chat template, or it fails.
        """
        import jinja2

        if not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; leave out --apply_chat_template")

        def render(history: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return render(chat_history)
        except jinja2.exceptions.TemplateError:
            try:
                return render([message for message in chat_history if message["role"] != "system"])
            except jinja2.exceptions.TemplateError as error:
                raise UserError(f"the tokenizer's chat template cannot write the task's dialogue: {error}") from error

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a text that begins with the prefix token's name gets no second one."""
        begun = string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self._remembered(string, False if add_special_tokens is None and begun else add_special_tokens)

    def _encode(self, string: str, add_special_tokens: bool | None) -> list[int]:
        flag = self._add_bos if add_special_tokens is None else add_special_tokens
        return self.tokenizer.encode(string, verbose=False, **({} if flag is None else {"add_special_tokens": flag}))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is_greedy) of (texts, context ids, continuation ids); long contexts lose their left."""
        pairs = []
        for texts, context, continuation in requests:
            if not continuation or len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation has {len(continuation)} tokens, it needs one at least and {self.max_length} "
                    f"(the model's length) at most: {texts[1] if texts else ''!r:.80}"
                )
            kept = max(1, self.max_length + 1 - len(continuation))
            pairs.append((context[-kept:], continuation))
        with progress("log-likelihoods", total=len(pairs), unit="requests") as bar:
            found = likelihoods(
                self._model,
                self._params,
                pairs,
                mesh=self._mesh,
                batch_size=self.batch_size,
                on_progress=self._advance(bar),
            )
        answers = list(zip(found.logps.tolist(), found.greedy.tolist(), strict=True))
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log π of whole texts, in windows of the model's length that predict each token once."""
        owners: list[int] = []
        windows: list[tuple[None, list[int], list[int]]] = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                owners.append(i)
                windows.append((None, *make_disjoint_window(pair)))
        totals = [0.0] * len(requests)
        for owner, (logp, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logp
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The model's text after each context, cut at the task's stop strings; greedy questions are answered once."""
        by_options: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_options.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        with progress("generating", total=len(requests), unit="requests") as bar:
            for members in by_options.values():
                options = self._options(requests[members[0]].args[1])
                contexts = [requests[i].args[0] for i in members]
                # Repeats of a sampled question are meant to differ.
                asked = contexts if options["temperature"] else list(dict.fromkeys(contexts))
                found = self._generate(asked, options, self._advance(bar))
                answers = (
                    found if options["temperature"] else [dict(zip(asked, found, strict=True))[c] for c in contexts]
                )
                bar.advance(len(contexts) - len(asked))
                for i, answer in zip(members, answers, strict=True):
                    texts[i] = answer
                    self.cache_hook.add_partial("generate_until", requests[i].args, answer)
        return texts

    def _options(self, asked: dict[str, Any]) -> dict[str, Any]:
        """A task's generation options in the sampler's words, with the defaults of the `hf` backend."""
        eos = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        options = cast(dict[str, Any], normalize_gen_kwargs(asked, self.max_gen_toks))
        for name, value in options.items():
            if name not in _OPTIONS and value not in _NEUTRAL.get(name, ()):
                raise UserError(
                    f"a task asks for the generation option {name}={value!r}; there is {', '.join(_OPTIONS)}"
                )
        if options["max_gen_toks"] >= self.max_length:
            raise UserError(
                f"a task generates up to {options['max_gen_toks']} tokens (max_gen_toks), which leaves no room for its "
                f"prompt: the model's length is {self.max_length}"
            )
        return {
            "until": handle_stop_sequences(options["until"], eos=eos),
            "max_new_tokens": options["max_gen_toks"],
            "temperature": float(options.get("temperature") or 0.0) if options["do_sample"] else 0.0,
            "top_k": int(options.get("top_k", 50) or 0),  # transformers' default where a task samples
            "top_p": float(options.get("top_p", 1.0)),
        }

    def _generate(self, contexts: list[str], options: dict[str, Any], advance: Callable[[int], None]) -> list[str]:
        room = self.max_length - options["max_new_tokens"]
        bos, prompts = self.tokenizer.bos_token, []
        for context in contexts:
            ids = self._encode(context, False if bos is not None and context.startswith(bos) else None)
            prompts.append(ids[-room:] or [self.prefix_token_id])
        return generate_texts(
            self._model,
            self._decode_params,
            self.tokenizer,
            prompts,
            seed=self._seed,
            slots=self._slots(max(map(len, prompts)) + options["max_new_tokens"]),
            mesh=self._decode_mesh,
            on_progress=advance,
            **options,
        )

    def _slots(self, tokens: int) -> int:
        """Responses of so many tokens to decode together: a slot costs memory, and hardly time."""
        config = self._model.config
        width = config.num_kv_heads * config.head_dim * jnp.dtype(self._model.compute_dtype).itemsize
        room = _CACHE_BYTES // (2 * config.num_layers * width * tokens)
        return min(max(self.batch_size, room), 4 * self.batch_size)

    def _advance(self, bar: Any) -> Callable[[int], None]:
        def advance(count: int) -> None:
            bar.advance(count)
            self._check_stop()

        return advance
