"""One template for sampling and for training: how messages and answers become token ids.

Prompt and response are tokenised once, each by itself, and joined as ids. The response is tokenised *as a
continuation*: SentencePiece tokenizers put a space in front of whatever they encode, which is right at the
start of a text and wrong in the middle of it, so responses go through a copy of the tokenizer with that
switched off. The ids of prompt + response therefore spell the full rendering, character by character.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from selfplay_jax import stores
from selfplay_jax.errors import UserError

# Contents one after the other: a newline between messages, nothing between the prompt and its answer.
_PLAIN = """\
{%- for message in messages -%}
{%- if not loop.first and message['role'] != 'assistant' -%}{{- '\\n' -}}{%- endif -%}
{{- message['content'] -}}
{%- endfor -%}"""

# The official SPIN code's sampling template. The space after "Response:" belongs to the answer, where
# tokenizers expect it.
_ALPACA = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{{- '### Response: ' + message['content'] + eos_token + '\\n\\n' -}}
{%- elif message['role'] == 'system' -%}{{- message['content'] + '\\n\\n' -}}
{%- else -%}{{- '### Instruction: ' + message['content'] + '\\n\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:' -}}{%- endif -%}"""

_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

# zephyr-7b's. Like the real one it writes no BOS.
_ZEPHYR = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"""

# Llama 3's; its BOS is written with the ids.
_LLAMA3 = """\
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""

_BUILT_IN = {"plain": _PLAIN, "alpaca": _ALPACA, "chatml": _CHATML, "zephyr": _ZEPHYR, "llama3": _LLAMA3}
KINDS = ("auto", "chat", *_BUILT_IN)
_PROBE = "Probe7Answer"
_NO_THOUGHT = re.compile(r"<think>\s*</think>\s*\Z")
# Llama 3.2's template, for one, writes today's date into every prompt. A run that goes on tomorrow must read the same
# prompts, so the date is the one that these templates fall back to.
_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


def load_tokenizer(path: str | Path) -> Any:
    """The fast tokenizer of a Hugging Face directory or hub name. Needs no torch, runs no remote code."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found": so it should be
    if stores.is_remote(path):
        from selfplay_jax.models import hf_directory

        path = hf_directory.local_directory(path, weights=False)
    text = str(Path(path).expanduser()) if str(path).startswith("~") else str(path)
    local = os.path.isdir(text)
    if not local and (isinstance(path, Path) or text.startswith((".", "/")) or text.count("/") > 1):
        raise UserError(f"cannot load a tokenizer from {text}: there is no such directory")
    if local and not os.path.isfile(os.path.join(text, "tokenizer.json")):
        # transformers would make up an empty one.
        raise UserError(
            f"cannot load a tokenizer from {text}: it holds no tokenizer.json; where transformers reads the tokenizer "
            "that is there, save it once with AutoTokenizer.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(text, trust_remote_code=False, local_files_only=local)
    except Exception as error:  # files, JSON, network, unknown classes: each its own exception type
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"cannot load a tokenizer from {text}: {reason}; it must be a directory with tokenizer.json and "
            "tokenizer_config.json, or a model's name on the Hugging Face hub"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer in {text} has no tokenizer.json; save it as a fast tokenizer first")
    return tokenizer


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raises UserError if the tokenizer can produce an id that the model has no embedding for."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer does not fit the model: its token {token!r} has id {largest}, but the model's "
            f"vocab_size is {vocab_size}; use the tokenizer that belongs to the model"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Template:
    """Turns messages and answers into ids, and sampled ids into text. Make it with `from_tokenizer`.

    kind: "chat", "plain", "alpaca", "chatml", "zephyr", "llama3" or the path of a Jinja file.
    end_id: the token that ends an assistant's turn; every encoded response ends in it, once.
    stop_ids: every token that ends a sampled response; `end_id` first.
    bos_id: the tokenizer's beginning-of-text token, or None.
    """

    tokenizer: Any = dataclasses.field(repr=False)
    kind: str
    end_id: int
    stop_ids: tuple[int, ...]
    bos_id: int | None
    _jinja: str = dataclasses.field(repr=False)
    _add_bos: bool = dataclasses.field(repr=False)
    _prompts: Any = dataclasses.field(repr=False)
    _continuation: Any = dataclasses.field(repr=False)
    _prompt_tail: str = dataclasses.field(repr=False)
    _lead: str = dataclasses.field(repr=False)
    _gap: str = dataclasses.field(repr=False)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, kind: str = "auto", stop_ids: Iterable[int] = ()) -> "Template":
        """Works out a template's pieces by rendering a short dialogue with and without its answer.

        Args:
          tokenizer: a fast transformers tokenizer.
          kind: "chat" (the tokenizer's own chat template), "plain" (contents only, nothing between prompt and
            answer), "alpaca" (SPIN's `### Instruction: ... ### Response: `), "chatml", "zephyr", "llama3", the path
            of a .jinja template, or "auto": "chat" if the tokenizer has a chat template, else "plain".
          stop_ids: more tokens that end a response, e.g. those of the model's generation_config.json.

        What the template writes between its generation prompt and the answer goes to the answer if it is
        blank (Llama-2's space) and to the prompt if not (Qwen3's empty `<think>` block). The end of turn is
        the first special token after the answer, else the tokenizer's EOS. The tokenizer's and the user's
        templates write their own BOS or none; our own get one iff the tokenizer itself adds one.

        Raises:
          UserError: no such kind or file, no chat template, no end token, or a template that fails.
        """
        kind, jinja = _find(tokenizer, str(kind))
        question = [{"role": "user", "content": "Hello"}]
        prompt = _render(tokenizer, jinja, kind, question, True)
        full = _render(tokenizer, jinja, kind, [*question, {"role": "assistant", "content": _PROBE}], False)
        before, found, tail = full.rpartition(_PROBE)
        if not found:
            raise UserError(f"template {kind!r} does not write the assistant's content: {full!r}")
        lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        end_id, gap = _end_of_turn(tokenizer, kind, tail)
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        bos_id = tokenizer.bos_token_id
        return cls(
            tokenizer=tokenizer,
            kind=kind,
            end_id=end_id,
            stop_ids=tuple(dict.fromkeys([end_id, *eos, *(int(i) for i in stop_ids)])),
            bos_id=bos_id,
            _jinja=jinja,
            _add_bos=kind in _BUILT_IN and bos_id is not None and tokenizer.encode("Hello")[:1] == [bos_id],
            _prompts=_copy(tokenizer),
            _continuation=_continuation(tokenizer),
            _prompt_tail=lead if lead.strip() else "",
            _lead="" if lead.strip() else lead,
            _gap=gap,
        )

    @property
    def jinja(self) -> str | None:
        """The template as a model directory's chat_template.jinja; None where it is the tokenizer's own."""
        if self.kind == "chat":
            return None
        return ("{{- bos_token -}}" if self._add_bos else "") + self._jinja

    def render_prompt(self, messages: Sequence[dict[str, str]], answer: str = "") -> str:
        """The prompt as text, up to where the answer begins.

        An `answer` that brings its own `<think>` part begins before the empty one that some templates write.
        """
        text = _render(self.tokenizer, self._jinja, self.kind, messages, True) + self._prompt_tail
        return _NO_THOUGHT.sub("", text) if answer.startswith("<think>") else text

    def encode_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of the rendered prompt, with one BOS at most."""
        return self.encode_rendered(self.render_prompt(messages))

    def encode_rendered(self, prompt_text: str) -> list[int]:
        """Ids of what `render_prompt` wrote."""
        return self.encode_prompt_texts([prompt_text])[0]

    def encode_prompt_texts(self, prompt_texts: Sequence[str]) -> list[list[int]]:
        """As `encode_rendered`, many at once: on all cores."""
        rows = [row.ids for row in self._prompts.encode_batch_fast(list(prompt_texts), add_special_tokens=False)]
        if self._add_bos:
            rows = [ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids] for ids in rows]
        return rows

    def encode_response(self, text: str) -> list[int]:
        """Ids of an answer, ending in `end_id`; no BOS. Names of special tokens in the text stay text."""
        return self.encode_responses([text])[0]

    def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode_response`, many at once: on all cores."""
        end = self.tokenizer.convert_ids_to_tokens(self.end_id)
        whole = []
        for text in texts:
            while text.endswith(end):  # data sets that already write the end of turn
                text = text.removesuffix(end)
            whole.append(self._lead + text + self._gap)
        rows = self._continuation.encode_batch_fast(whole, add_special_tokens=False)
        return [[*row.ids, self.end_id] for row in rows]

    @functools.cached_property
    def tokenizer_sha256(self) -> str:
        """Tells tokenizers apart: vocabulary, merges, special tokens and every rule."""
        names = sorted((name, str(token)) for name, token in self.tokenizer.special_tokens_map.items())
        return hashlib.sha256((self._prompts.to_str() + json.dumps(names)).encode()).hexdigest()

    @functools.cached_property
    def sha256(self) -> str:
        """Tells templates apart that would write other ids with the same tokenizer."""
        parts = (self._jinja, self._prompt_tail, self._lead, self._gap, self._add_bos, self.bos_id, self.end_id)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def decode(self, ids: Sequence[int]) -> str:
        """The answer's text: undoes `encode_response`; also for sampled ids, finished or not."""
        ids = [int(i) for i in ids]
        finished = bool(ids) and ids[-1] in self.stop_ids
        text = self._continuation.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
        text = text.removeprefix(self._lead)
        return text.removesuffix(self._gap) if finished else text


def _find(tokenizer: Any, kind: str) -> tuple[str, str]:
    """(kind, Jinja text)."""
    if kind == "auto":
        kind = "chat" if tokenizer.chat_template else "plain"
    if kind in _BUILT_IN:
        return kind, _BUILT_IN[kind]
    if kind == "chat":
        if not tokenizer.chat_template:
            kinds = ", ".join(_BUILT_IN)
            raise UserError(f"data.template is 'chat', but the tokenizer has none; use {kinds} or a .jinja file")
        try:
            text = tokenizer.get_chat_template()
        except ValueError as error:  # several templates, none called default
            raise UserError(f"data.template is 'chat', and the tokenizer's is unclear: {error}") from error
        return kind, _FIXED_DATE + text if "strftime_now" in text else text
    path = Path(kind).expanduser()
    if path.is_file():
        try:
            text = path.read_text("utf-8")
            return kind, _FIXED_DATE + text if "strftime_now" in text else text
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the chat template {kind}: {error}") from error
    if path.suffix in (".jinja", ".jinja2", ".j2") or "/" in kind:
        raise UserError(f"the chat template {kind} (data.template) does not exist")
    close = difflib.get_close_matches(kind, KINDS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"use {', '.join(KINDS)} or the path of a .jinja file"
    raise UserError(f"data.template {kind!r} is unknown; {hint}")


def _render(tokenizer: Any, jinja: str, kind: str, messages: Sequence[dict[str, str]], generation: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            list(messages), chat_template=jinja, tokenize=False, add_generation_prompt=generation
        )
    except Exception as error:  # a template is a program of someone else's: it may fail in any way
        roles, reason = ", ".join(message["role"] for message in messages), str(error).strip().splitlines()
        raise UserError(
            f"template {kind!r} cannot write a dialogue of the turns ({roles}): "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error


def _end_of_turn(tokenizer: Any, kind: str, tail: str) -> tuple[int, str]:
    """The first special token of what follows an answer, and the text before it."""
    added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    found = [(tail.index(token), -len(token), token) for token in added if token and token in tail]
    if found:
        position, _, token = min(found)
        return added[token], tail[:position]
    if tokenizer.eos_token_id is None:
        raise UserError(f"template {kind!r} ends an answer with no special token and the tokenizer has no eos_token")
    return tokenizer.eos_token_id, ""


def _copy(tokenizer: Any) -> Any:
    """A copy whose rows no one's settings cut or pad."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _continuation(tokenizer: Any) -> Any:
    """A copy that adds no space in front, strips none, and reads the names of special tokens as text."""
    from tokenizers import Tokenizer

    whole = json.loads(_copy(tokenizer).to_str())
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        whole[part] = _without_prefix_space(whole[part])
    copy = Tokenizer.from_str(json.dumps(whole))
    copy.encode_special_tokens = True
    return copy


def _without_prefix_space(part: Any) -> Any:
    if isinstance(part, list):
        return [_without_prefix_space(item) for item in part]
    if not isinstance(part, dict):
        return part
    match part.get("type"):
        case "Prepend":
            return {"type": "Sequence", "normalizers": []}
        case "Metaspace":
            return {**part, "prepend_scheme": "never"}
        case "ByteLevel":
            return {**part, "add_prefix_space": False}
        case "Strip" if part.get("content") == " ":
            return {**part, "start": 0}
    return {key: _without_prefix_space(value) for key, value in part.items()}
