"""Tiny tokenizers of the three kinds there are, and chat templates with every habit that needs care."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Hello two worlds, how are you?",
    "a+b=c #12 is 345 or 6789",
    "user assistant system Question: Answer:",
]
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (  # writes the BOS as text and trims, as Llama-3.1's does
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\n\n' + m['content'] | trim "
    "+ '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
LLAMA2 = (  # a space before the answer, and one before the end token; refuses what does not alternate
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR_7B = (  # as HuggingFaceH4/zephyr-7b-beta has it
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
LLAMA3_8B = (  # as meta-llama/Meta-Llama-3-8B-Instruct has it
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
THINKING = (  # Qwen3: an empty think block before the answer, which the generation prompt leaves to the model
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(specials: list[str], *, template: str | None = None, **names: str) -> PreTrainedTokenizerFast:
    """GPT-2/Qwen/Llama-3 style: a byte-level BPE."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **names)
    tokenizer.chat_template = template
    return tokenizer


def qwen(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """No BOS at all; the padding token ends documents, another one ends turns."""
    return byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        template=template,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",  # pad id == eos id
    )


def with_bos(core: Tokenizer, bos: str) -> None:
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )


def llama3() -> PreTrainedTokenizerFast:
    """Adds a BOS, and its template writes one too; the end of turn is not the EOS."""
    tokenizer = byte_level(
        ["<|bos|>", "<|eos|>", "<|head|>", "<|/head|>", "<|eot|>"],
        template=LLAMA3,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|eos|>",
    )
    with_bos(tokenizer.backend_tokenizer, "<|bos|>")
    return tokenizer


def llama3_8b() -> PreTrainedTokenizerFast:
    """Llama 3's own names for its special tokens, and its template."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = byte_level(specials, template=LLAMA3_8B, bos_token=specials[0], eos_token=specials[1])
    with_bos(tokenizer.backend_tokenizer, specials[0])
    return tokenizer


def sentencepiece(style: str) -> PreTrainedTokenizerFast:
    """Llama-2 style, adds a BOS; `style`: the prefix space by a normalizer (old) or by Metaspace (new)."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if style == "prepend":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=style, split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    # The trainer made the bytes special; in a real SentencePiece model they are ordinary tokens.
    whole = json.loads(core.to_str())
    whole["added_tokens"] = whole["added_tokens"][:3]
    core = Tokenizer.from_str(json.dumps(whole))
    with_bos(core, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


DIALOGUE = [user("Hello"), assistant("two worlds"), user("how are you?")]
